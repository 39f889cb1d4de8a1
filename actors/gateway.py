"""The gateway as a Ray Serve deployment: HTTP through Serve's HTTP proxy; gRPC through its gRPC proxy, or a server of
the replica's own (actors/grpc_server.py).
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Literal

from fastapi import FastAPI
from google.protobuf.message import Message
from ray import serve

from actors import grpc_server
from actors.api_keys import ApiKeys, read_keys
from actors.callers import Callers, living_proxies
from actors.client import EngineClient
from actors.current_span import start_tracing
from actors.garbage import keep_all_there_is
from actors.gateway_core import GatewayCore
from actors.grpc_errors import Context
from actors.http_api import build_http_app
from actors.image_fetch import ImageFetcher
from actors.image_hosts import HostRules
from actors.image_prompt import ImagePrompts
from actors.logs import set_level, set_up_logs
from actors.model_info import ModelInfo
from actors.ray_metrics import RayMetrics
from cluster.config import GatewayConfig, TracingConfig, VisionConfig
from engine.image_spec import ImageSpec
from engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from actors.tracing import Tracing

log = logging.getLogger("herder")

_NO_TRACES = TracingConfig()


@serve.ingress()
class Gateway(grpc_server.Servicers):
    """Both interfaces of one served model.

    Serve finds the gRPC methods by name, and builds the HTTP app after `__init__`.
    """

    _standalone: grpc_server.GrpcServer | None = None
    _tracing: Tracing | None = None
    _watching: asyncio.Task[None] | None = None

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
        log_format: Literal["text", "json"],
        log_prompts: bool,
        tracing: TracingConfig,
    ) -> None:
        """`connect` reaches the engines; it is called once, in the replica."""
        set_up_logs(log_level, log_format)
        model = ModelInfo.from_dir(model_path, served_name, max_context, created=int(time.time()))
        tokenizer = Tokenizer.from_dir(model_path)
        spec = ImageSpec.from_dir(model_path)
        images = None if spec is None else ImagePrompts(spec, vision, ImageFetcher(vision))
        version = importlib.metadata.version("herder")
        self._tracing = start_tracing(tracing, "gateway")
        self.core = GatewayCore(
            await connect(), tokenizer, model, version, images, RayMetrics(), self._tracing, log_prompts
        )
        self.keys = keys
        self.max_message_bytes = config.max_body_bytes
        self._callers = Callers()
        if config.grpc.mode == "standalone":
            self._standalone = await grpc_server.start(self, config)
        else:
            self._watching = asyncio.create_task(self._callers.watch(living_proxies))
        keep_all_there_is()
        log.info(
            "gateway up model=%s max_context=%d tokenizer=%s images=%s",
            served_name,
            max_context,
            tokenizer is not None,
            images is not None,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_http_app(self.core, self.keys, self.max_message_bytes)

    @asynccontextmanager
    async def admit(self, request: Message, context: Context, operation: str | None = None) -> AsyncIterator[None]:
        with self._callers.call():
            async with super().admit(request, context, operation):
                yield

    def reconfigure(self, user_config: Mapping[str, str]) -> None:
        """Serve's `user_config`: the log level, which may change while requests run."""
        set_level(user_config["log_level"])

    async def __del__(self) -> None:  # Serve awaits it, before it ends the replica, be it up or not
        if self._watching is not None:
            self._watching.cancel()
        if self._standalone is not None:
            await self._standalone.stop()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)


def build_app(
    model_path: str,
    served_name: str,
    max_context: int,
    config: GatewayConfig,
    connect: Callable[[], Awaitable[EngineClient]],
    vision: VisionConfig,
    log_level: str = "INFO",
    resources: Mapping[str, float] | None = None,
    log_format: Literal["text", "json"] = "text",
    log_prompts: bool = False,
    tracing: TracingConfig = _NO_TRACES,
) -> serve.Application:
    """The Serve application, for `serve.run`. `connect` has to pickle; `resources` are what each replica reserves.

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
        ray_actor_options={"num_cpus": 0, "resources": dict(resources or {})},
    )
    return deployment(Gateway).bind(
        model_path, served_name, max_context, config, vision, keys, connect, log_level, log_format, log_prompts, tracing
    )
