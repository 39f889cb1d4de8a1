"""The gateway as a Ray Serve deployment: HTTP through Serve's HTTP proxy; gRPC through its gRPC proxy, or a server of
the replica's own (actors/grpc_server.py).
"""

from __future__ import annotations

import importlib.metadata
import logging
import time
from collections.abc import Awaitable, Callable, Mapping

from fastapi import FastAPI
from ray import serve

from actors import grpc_server
from actors.api_keys import ApiKeys, read_keys
from actors.client import EngineClient
from actors.gateway_core import GatewayCore
from actors.http_api import build_http_app
from actors.image_fetch import ImageFetcher
from actors.image_hosts import HostRules
from actors.image_prompt import ImagePrompts
from actors.model_info import ModelInfo
from cluster.config import GatewayConfig, VisionConfig
from engine.image_spec import ImageSpec
from engine.tokenizer import Tokenizer

log = logging.getLogger("herder")


@serve.ingress()
class Gateway(grpc_server.Servicers):
    """Both interfaces of one served model.

    Serve finds the gRPC methods by name, and builds the HTTP app after `__init__`.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        model_path: str,
        served_name: str,
        max_context: int,
        config: GatewayConfig,
        vision: VisionConfig,
        keys: ApiKeys,
        connect: Callable[[], Awaitable[EngineClient]],
        log_level: str,
    ) -> None:
        """`connect` reaches the engines; it is called once, in the replica."""
        logging.basicConfig(level=log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
        model = ModelInfo.from_dir(model_path, served_name, max_context, created=int(time.time()))
        tokenizer = Tokenizer.from_dir(model_path)
        spec = ImageSpec.from_dir(model_path)
        images = None if spec is None else ImagePrompts(spec, vision, ImageFetcher(vision))
        self.core = GatewayCore(await connect(), tokenizer, model, importlib.metadata.version("herder"), images)
        self.keys = keys
        self.max_message_bytes = config.max_body_bytes
        self._standalone: grpc_server.GrpcServer | None = None
        if config.grpc.mode == "standalone":
            self._standalone = await grpc_server.start(self, config)
        log.info(
            "gateway up model=%s max_context=%d tokenizer=%s images=%s",
            served_name,
            max_context,
            tokenizer is not None,
            images is not None,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_http_app(self.core, self.keys, self.max_message_bytes)

    def reconfigure(self, user_config: Mapping[str, str]) -> None:
        """Serve's `user_config`: the log level, which may change while requests run."""
        logging.getLogger().setLevel(user_config["log_level"])

    async def __del__(self) -> None:  # Serve awaits it, before it ends the replica
        if self._standalone is not None:
            await self._standalone.stop()


def build_app(
    model_path: str,
    served_name: str,
    max_context: int,
    config: GatewayConfig,
    connect: Callable[[], Awaitable[EngineClient]],
    vision: VisionConfig,
    log_level: str = "INFO",
) -> serve.Application:
    """The Serve application, for `serve.run`. `connect` has to pickle.

    Raises ValueError for a broken checkpoint, ConfigError for a file of API keys or for URL hosts that cannot be used.
    """
    ModelInfo.from_dir(model_path, served_name, max_context)
    HostRules.parse(vision.url_hosts)
    keys = ApiKeys.of(read_keys(config))
    config = config.model_copy(update={"api_keys": (), "api_keys_file": None})  # the digests are enough
    deployment = serve.deployment(
        name="gateway",
        num_replicas=config.replicas,
        max_ongoing_requests=config.max_ongoing_requests,
        ray_actor_options={"num_cpus": 0},
    )
    return deployment(Gateway).bind(model_path, served_name, max_context, config, vision, keys, connect, log_level)
