"""The gateway's way to the engines, over handles that stand in for Ray's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import SimpleNamespace

import pytest

from actors.ray_client import RayEngineClient
from engine.request import ErrorCode, FinishReason, Request, RequestOutput, RequestRejected, SamplingParams

PARAMS = SamplingParams(max_tokens=2)


class Handle:
    """An attention actor's, as far as the client uses it; `calls` tells what came when."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.admit = asyncio.Event()  # submissions wait for it, as for a grammar that is compiled
        self.rejection: RequestRejected | None = None
        self.queue: asyncio.Queue[list[RequestOutput]] = asyncio.Queue()
        self.submit = remote(self._submit)
        self.abort = remote(self._abort)
        self.outputs = SimpleNamespace(remote=self._outputs)

    async def _submit(self, request: Request, gateway_id: str) -> RequestRejected | None:
        await self.admit.wait()
        self.calls.append(f"submit {request.request_id}")
        return self.rejection

    async def _abort(self, request_ids: Sequence[str]) -> int:
        self.calls += [f"abort {request_id}" for request_id in request_ids]
        return len(request_ids)

    async def _outputs(self, gateway_id: str) -> AsyncIterator[Awaitable[list[RequestOutput]]]:
        while True:
            yield asyncio.ensure_future(self.queue.get())


def remote(function: Callable[..., Awaitable[object]]) -> SimpleNamespace:
    return SimpleNamespace(remote=lambda *args: asyncio.ensure_future(function(*args)))


@pytest.fixture
async def handle() -> Handle:
    return Handle()


@pytest.fixture
async def client(handle: Handle) -> RayEngineClient:
    async def drain() -> int:
        return 3

    return RayEngineClient(SimpleNamespace(drain=remote(drain)), {"attention-0": handle})


def request(name: str) -> Request:
    return Request(name, (1,), PARAMS)


async def test_outputs_reach_their_requests(client: RayEngineClient, handle: Handle) -> None:
    handle.admit.set()
    both = [asyncio.create_task(collect(client, name)) for name in ("a", "b")]
    await asyncio.sleep(0.01)
    await handle.queue.put([RequestOutput("b", (5,)), RequestOutput("a", (6,), finish_reason=FinishReason.STOP)])
    await handle.queue.put([RequestOutput("b", (7,), finish_reason=FinishReason.LENGTH)])
    assert await asyncio.gather(*both) == [[6], [5, 7]]
    await asyncio.sleep(0.01)
    assert handle.calls == ["submit a", "submit b"]


async def collect(client: RayEngineClient, name: str) -> list[int]:
    return [token for output in [o async for o in client.generate(request(name))] for token in output.token_ids]


async def test_a_rejection_is_raised_and_not_aborted(client: RayEngineClient, handle: Handle) -> None:
    handle.admit.set()
    handle.rejection = RequestRejected("full", code=ErrorCode.RESOURCE_EXHAUSTED)
    with pytest.raises(RequestRejected, match="full"):
        await collect(client, "a")
    await asyncio.sleep(0.01)
    assert handle.calls == ["submit a"]


async def test_a_client_that_goes_away_before_admission_is_aborted_after_it(
    client: RayEngineClient, handle: Handle
) -> None:
    waiting = asyncio.create_task(collect(client, "a"))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await asyncio.sleep(0.01)
    assert handle.calls == []
    handle.admit.set()
    await asyncio.sleep(0.01)
    assert handle.calls == ["submit a", "abort a"]


async def test_a_client_that_goes_away_later_is_aborted_at_once(client: RayEngineClient, handle: Handle) -> None:
    handle.admit.set()
    outputs = client.generate(request("a"))
    await handle.queue.put([RequestOutput("a", (5,))])
    task = asyncio.create_task(anext(outputs))
    await asyncio.sleep(0.01)
    await handle.queue.put([RequestOutput("a", (5,))])
    assert (await task).token_ids == (5,)
    await outputs.aclose()
    await asyncio.sleep(0.01)
    assert handle.calls == ["submit a", "abort a"]


async def test_drain_asks_the_controller(client: RayEngineClient) -> None:
    assert await client.drain() == 3
