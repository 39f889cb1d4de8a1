"""The standalone gRPC server: what Ray Serve's proxy cannot do (TLS, grpc.health.v1, rich errors, deadlines).

It runs inside each gateway replica, in the replica's event loop, on `gateway.host` and `gateway.grpc_port` of the
replica's node; HTTP stays on Ray Serve's proxy. Several replicas on one node share the port: gRPC sets SO_REUSEPORT, so
the kernel deals connections out to them. Between nodes, clients or a load balancer choose; every replica reaches all
engines.
"""

from __future__ import annotations

from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from actors.grpc_api import ControlServicer, InferenceServicer
from actors.grpc_health import HealthServicer
from cluster.config import GatewayConfig, TlsConfig
from herder.v1 import control_pb2, inference_pb2
from herder.v1.control_pb2_grpc import add_ControlServiceServicer_to_server
from herder.v1.inference_pb2_grpc import add_InferenceServiceServicer_to_server

_GRACE_S = 5.0  # for the last messages of calls that have ended
_KEEPALIVE_MS = 60_000  # a client that does not answer a ping is gone, and its requests are aborted
_KEEPALIVE_TIMEOUT_MS = 20_000
_LEAST_PING_INTERVAL_MS = 10_000  # clients that ping more often are disconnected


@dataclass(frozen=True)
class GrpcServer:
    """A server that runs; `port` is the one it listens on."""

    server: grpc.aio.Server
    port: int

    async def stop(self) -> None:
        """Takes no more calls, and waits a little for those that run."""
        await self.server.stop(_GRACE_S)


class Servicers(InferenceServicer, ControlServicer):
    """Both services in one object, as the gateway is."""


async def start(servicers: Servicers, gateway: GatewayConfig) -> GrpcServer:
    """Starts the server in this event loop.

    Raises RuntimeError when the port cannot be had, OSError when a file of `gateway.grpc.tls` cannot be read.
    """
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", gateway.max_body_bytes),
            ("grpc.so_reuseport", 1),
            ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
            ("grpc.http2.min_ping_interval_without_data_ms", _LEAST_PING_INTERVAL_MS),
        ],
        maximum_concurrent_rpcs=gateway.max_ongoing_requests,
    )
    add_InferenceServiceServicer_to_server(servicers, server)
    add_ControlServiceServicer_to_server(servicers, server)
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(servicers.core), server)
    services = [
        module.DESCRIPTOR.services_by_name[name].full_name
        for module, name in (
            (inference_pb2, "InferenceService"),
            (control_pb2, "ControlService"),
            (health_pb2, "Health"),
        )
    ]
    reflection.enable_server_reflection([*services, reflection.SERVICE_NAME], server)
    port = _listen(server, gateway)
    await server.start()
    return GrpcServer(server, port)


def _listen(server: grpc.aio.Server, gateway: GatewayConfig) -> int:
    host = f"[{gateway.host}]" if ":" in gateway.host else gateway.host
    address = f"{host}:{gateway.grpc_port}"
    if gateway.grpc.tls is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(address, _credentials(gateway.grpc.tls))


def _credentials(tls: TlsConfig) -> grpc.ServerCredentials:
    client_ca = None if tls.client_ca is None else tls.client_ca.read_bytes()
    return grpc.ssl_server_credentials(
        [(tls.key.read_bytes(), tls.cert.read_bytes())],
        root_certificates=client_ca,
        require_client_auth=client_ca is not None,
    )
