"""A deployment as a Ray Serve configuration: what `serve deploy` and KubeRay's `serveConfigV2` take. Pure.

The application's `args` hold what a deployment is; a change of them starts its actors anew. What may change while it
runs stands in the deployments' options and their `user_config` instead (cluster/live.py), where Serve applies it in
place.
"""

from __future__ import annotations

import math
from typing import Any

from cluster.config import DeploymentConfig, GatewayConfig
from cluster.config_errors import ConfigError
from cluster.live import LiveSettings
from cluster.manifests_pods import Manifest

APP_NAME = "herder"
IMPORT_PATH = "actors.serve_app:build"
# For Serve's gRPC proxy.
GRPC_SERVICER_FUNCTIONS = (
    "herder.v1.inference_pb2_grpc.add_InferenceServiceServicer_to_server",
    "herder.v1.control_pb2_grpc.add_ControlServiceServicer_to_server",
)
# The names of deployments in the application.
FLEET, GATEWAY = "fleet", "gateway"


def serve_config(config: DeploymentConfig, gateway_nodes: int | None = None) -> Manifest:
    """The configuration of one Serve instance with the application `herder`.

    Args:
        gateway_nodes: so many nodes have one of the custom resource `gateway`; gateways are spread over these, and
            nothing else that Serve places by itself is anywhere else. None: wherever Serve likes.

    Raises:
        ConfigError: it holds API keys, which do not belong into such a file.
    """
    gateway = config.gateway
    if gateway.api_keys:
        raise ConfigError(["gateway.api_keys must not be rendered into a file: use gateway.api_keys_file"])
    manifest: Manifest = {
        "proxy_location": "EveryNode",
        "http_options": {"host": gateway.host, "port": gateway.http_port},
    }
    if gateway.grpc.mode == "serve":
        servicers = list(GRPC_SERVICER_FUNCTIONS)
        manifest["grpc_options"] = {"port": gateway.grpc_port, "grpc_servicer_functions": servicers}
    application: Manifest = {
        "name": APP_NAME,
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "args": _args(config),
        "deployments": _deployments(config, gateway_nodes),
    }
    return manifest | {"applications": [application]}


def _args(config: DeploymentConfig) -> Manifest:
    """The configuration, as far as it is not the default or stands in the deployments' options."""
    elsewhere: dict[str, Any] = {"replicas": GatewayConfig().replicas}
    if config.gateway.grpc.mode == "serve":  # the standalone server has a limit of its own, from when it starts
        elsewhere["max_ongoing_requests"] = GatewayConfig().max_ongoing_requests
    gateway = config.gateway.model_copy(update=elsewhere)
    rest = LiveSettings().over(config).model_copy(update={"gateway": gateway})
    return rest.model_dump(mode="json", exclude_defaults=True)


def _deployments(config: DeploymentConfig, gateway_nodes: int | None) -> list[Manifest]:
    gateway: Manifest = {
        "name": GATEWAY,
        "num_replicas": config.gateway.replicas,
        "max_ongoing_requests": config.gateway.max_ongoing_requests,
        "graceful_shutdown_timeout_s": config.gateway.drain_timeout_s,
        "user_config": {"log_level": config.log_level},
    }
    fleet: Manifest = {"name": FLEET, "user_config": LiveSettings.of(config).model_dump(mode="json")}
    if gateway_nodes is not None:
        gateway["max_replicas_per_node"] = math.ceil(config.gateway.replicas / gateway_nodes)
        for deployment in (gateway, fleet):
            deployment["ray_actor_options"] = {"num_cpus": 0, "resources": {GATEWAY: 0.01}}
    return [gateway, fleet]
