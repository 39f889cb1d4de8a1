"""The gateway's own gRPC server: TLS, grpc.health.v1, rich errors, reflection, deadlines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from actors import grpc_server
from actors.api_keys import NO_KEYS, ApiKeys
from actors.gateway_core import GatewayCore
from cluster.config import GatewayConfig, GrpcConfig, TlsConfig
from engine.request import ErrorCode, RequestRejected
from herder.v1 import inference_pb2 as pb
from herder.v1.control_pb2 import DrainRequest
from herder.v1.control_pb2_grpc import ControlServiceStub
from herder.v1.inference_pb2_grpc import InferenceServiceStub
from herder.v1.types_pb2 import SamplingParams
from tests.certificates import Authority
from tests.gateway.fakes import FakeEngine

Health = health_pb2.HealthCheckResponse


@asynccontextmanager
async def standalone(
    core: GatewayCore, tls: TlsConfig | None = None, keys: ApiKeys = NO_KEYS, **changes: object
) -> AsyncIterator[str]:
    """The server on a port of its own choice; gives its address."""
    servicers = grpc_server.Servicers()
    servicers.core, servicers.keys = core, keys
    gateway = GatewayConfig(grpc=GrpcConfig(mode="standalone", tls=tls), **changes)
    server = await grpc_server.start(servicers, gateway.model_copy(update={"grpc_port": 0}))
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        await server.stop()


async def test_calls_and_reflection(core: GatewayCore) -> None:
    async with standalone(core) as address, grpc.aio.insecure_channel(address) as channel:
        answer = await InferenceServiceStub(channel).Generate(pb.GenerateRequest(text="Hi"))
        assert answer.choices[0].text == "Hello wörld"
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ask]))
        names = {service.name async for reply in call for service in reply.list_services_response.service}
        assert {"herder.v1.InferenceService", "herder.v1.ControlService", "grpc.health.v1.Health"} <= names


async def test_health_follows_readiness_and_draining(core: GatewayCore, engine: FakeEngine) -> None:
    ready = engine.cluster
    async with standalone(core) as address, grpc.aio.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        async def check(service: str = "") -> int:
            return (await health.Check(health_pb2.HealthCheckRequest(service=service))).status

        for service in ("", "herder.v1.InferenceService", "herder.v1.ControlService"):
            assert await check(service) == Health.SERVING
        engine.cluster = replace(ready, ready=False, reason="expert-1 is loading")
        assert await check() == Health.NOT_SERVING
        engine.cluster = ready
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await check("other")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = aiter(health.Watch(health_pb2.HealthCheckRequest()))
        assert (await anext(watch)).status == Health.SERVING
        await ControlServiceStub(channel).Drain(DrainRequest())
        assert await check() == Health.NOT_SERVING
        assert (await asyncio.wait_for(anext(watch), 3)).status == Health.NOT_SERVING
        unknown = aiter(health.Watch(health_pb2.HealthCheckRequest(service="other")))
        assert (await anext(unknown)).status == Health.SERVICE_UNKNOWN


async def test_rich_errors(core: GatewayCore, engine: FakeEngine) -> None:
    async with standalone(core) as address:
        with grpc.insecure_channel(address) as channel:
            stub = InferenceServiceStub(channel)

            def fail(request: pb.GenerateRequest) -> tuple[grpc.RpcError, object]:
                with pytest.raises(grpc.RpcError) as caught:
                    stub.Generate(request, timeout=10)
                status = rpc_status.from_call(caught.value)
                assert status is not None and status.message == caught.value.details()
                (detail,) = status.details
                for kind in (error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
                    if detail.Is(kind.DESCRIPTOR):
                        found = kind()
                        detail.Unpack(found)
                        return caught.value, found
                raise AssertionError(detail)

            bad = pb.GenerateRequest(text="Hi", sampling=SamplingParams(temperature=-1.0))
            error, detail = await asyncio.to_thread(fail, bad)
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            (violation,) = detail.field_violations
            assert violation.field == "temperature"
            assert violation.description == "temperature must be between 0 and 100, not -1.0" == error.details()
            engine.rejection = RequestRejected("the queue is full", code=ErrorCode.RESOURCE_EXHAUSTED)
            error, detail = await asyncio.to_thread(fail, pb.GenerateRequest(text="Hi"))
            assert (error.code(), detail.retry_delay.seconds) == (grpc.StatusCode.RESOURCE_EXHAUSTED, 1)


async def test_a_call_past_its_deadline_is_aborted(core: GatewayCore, engine: FakeEngine) -> None:
    engine.delay = 0.02
    async with standalone(core) as address, grpc.aio.insecure_channel(address) as channel:
        request = pb.GenerateRequest(text="Hi", sampling=SamplingParams(ignore_eos=True))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await InferenceServiceStub(channel).Generate(request, timeout=0.1)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        async with asyncio.timeout(1):
            while engine.running:
                await asyncio.sleep(0.01)


async def test_keys_and_sizes(core: GatewayCore) -> None:
    keys = ApiKeys.of(["sk-one"])
    async with (
        standalone(core, keys=keys, max_body_bytes=1000) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        stub = InferenceServiceStub(channel)
        for request, metadata, code in (
            (pb.GenerateRequest(text="Hi"), (), grpc.StatusCode.UNAUTHENTICATED),
            (pb.GenerateRequest(text="a" * 2000), "sk-one", grpc.StatusCode.RESOURCE_EXHAUSTED),
        ):
            given = metadata and (("authorization", f"Bearer {metadata}"),)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Generate(request, metadata=given)
            assert caught.value.code() is code
        # Health is open: those who watch the server have no key.
        check = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert check.status == Health.SERVING


async def test_two_replicas_on_a_node_share_the_port(core: GatewayCore) -> None:
    async with standalone(core) as address:
        servicers = grpc_server.Servicers()
        servicers.core = core
        gateway = GatewayConfig(grpc=GrpcConfig(mode="standalone"), grpc_port=int(address.rpartition(":")[2]))
        second = await grpc_server.start(servicers, gateway)
        assert second.port == gateway.grpc_port
        await second.stop()


# ---- TLS


async def test_tls(core: GatewayCore, tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path, "authority"), Authority(tmp_path, "stranger")
    cert, key = authority.issue("server")
    async with standalone(core, TlsConfig(cert=cert, key=key)) as address:

        async def ask(credentials: grpc.ChannelCredentials | None) -> str:
            if credentials is None:
                channel = grpc.aio.insecure_channel(address)
            else:
                channel = grpc.aio.secure_channel(address, credentials)
            async with channel:
                return (await InferenceServiceStub(channel).Generate(pb.GenerateRequest(text="Hi"))).choices[0].text

        assert await ask(grpc.ssl_channel_credentials(authority.cert.read_bytes())) == "Hello wörld"
        for wrong in (None, grpc.ssl_channel_credentials(stranger.cert.read_bytes())):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask(wrong)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_tls_of_both_sides(core: GatewayCore, tmp_path: Path) -> None:
    authority, clients, stranger = (Authority(tmp_path, name) for name in ("authority", "clients", "stranger"))
    cert, key = authority.issue("server")
    roots = authority.cert.read_bytes()
    async with standalone(core, TlsConfig(cert=cert, key=key, client_ca=clients.cert)) as address:
        for issuer, right in ((clients, True), (stranger, False), (None, False)):
            pair = [None, None] if issuer is None else [file.read_bytes() for file in reversed(issuer.issue("client"))]
            async with grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(roots, *pair)) as channel:
                call = InferenceServiceStub(channel).Generate(pb.GenerateRequest(text="Hi"))
                if right:
                    assert (await call).choices[0].text == "Hello wörld"
                else:
                    with pytest.raises(grpc.aio.AioRpcError):
                        await call
