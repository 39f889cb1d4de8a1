"""grpc.health.v1: whether a request sent now is answered, and nothing less."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from actors.gateway_core import GatewayCore
from engine.request import RequestRejected

SERVICES = frozenset({"", "herder.v1.InferenceService", "herder.v1.ControlService"})  # "": the whole server
_WATCH_EVERY_S = 1.0

Status = health_pb2.HealthCheckResponse


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # generated without types
    """Asks the deployment at each check, as /health/ready does; a watcher hears of a change within a second."""

    def __init__(self, core: GatewayCore) -> None:
        self._core = core

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in SERVICES:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service")
        return Status(status=await self._status())

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        told = None
        while True:
            known = request.service in SERVICES
            status = await self._status() if known else Status.SERVICE_UNKNOWN
            if status != told:
                told = status
                yield Status(status=status)
            await asyncio.sleep(_WATCH_EVERY_S)

    async def _status(self) -> int:
        try:
            ready = (await self._core.status()).ready
        except RequestRejected:  # nobody knows
            ready = False
        return int(Status.SERVING if ready else Status.NOT_SERVING)
