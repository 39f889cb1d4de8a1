"""Requests through a RayEngineClient over fake actors, as their clients see them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence

from actors.ray_client import RayEngineClient
from actors.vision_client import VisionClient
from engine.request import FinishReason, Request, RequestOutput, SamplingParams
from tests.gateway.fake_actors import OF_A_CLIENT, FakeController, FakeEngine

PARAMS = SamplingParams(max_tokens=9)


async def connect(
    controller: FakeController, failover_timeout_s: float = 5.0, vision: VisionClient | None = None
) -> RayEngineClient:
    client = RayEngineClient(lambda: controller, iter(range(100, 200)).__next__, failover_timeout_s, vision)
    await client.start()
    await asyncio.sleep(0)  # its streams begin
    return client


def request(name: str, **fields: object) -> Request:
    return Request(name, (1,), PARAMS, **fields)


class Stream:
    """A request's outputs, as its client gets them."""

    def __init__(self, client: RayEngineClient, one: Request, images: Sequence[bytes] = ()) -> None:
        self.tokens: list[int] = []
        self.last: RequestOutput | None = None
        self.task = asyncio.create_task(self._run(client.generate(one, images)))

    async def _run(self, outputs: AsyncIterator[RequestOutput]) -> None:
        OF_A_CLIENT.set(True)
        async for output in outputs:
            self.tokens += output.token_ids
            self.last = output

    async def end(self) -> RequestOutput:
        await asyncio.wait_for(self.task, 10)
        assert self.last is not None
        return self.last


async def until(happens: Callable[[], object]) -> None:
    end = time.monotonic() + 5
    while not happens():
        assert time.monotonic() < end, "it does not happen"
        await asyncio.sleep(0.001)


async def begin(client: RayEngineClient, engine: FakeEngine, one: Request, *tokens: int) -> Stream:
    """A stream at this engine that has brought these tokens."""
    stream = Stream(client, one)
    await until(lambda: one.request_id in engine.requests)
    for token in tokens:
        engine.send(RequestOutput(one.request_id, (token,)))
    await until(lambda: stream.tokens == list(tokens))
    return stream


def last(name: str, token: int) -> RequestOutput:
    return RequestOutput(name, (token,), finish_reason=FinishReason.LENGTH)
