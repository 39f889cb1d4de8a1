"""Handles that stand in for Ray's: attention actors that answer by a rule, and a controller that lists them."""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from types import SimpleNamespace

from ray.exceptions import ObjectLostError, RayActorError, RayError

from actors.status import EngineHandle
from engine.request import ErrorCode, FinishReason, Request, RequestError, RequestOutput, RequestRejected

FULL = RequestRejected("full", code=ErrorCode.RESOURCE_EXHAUSTED)
OF_A_CLIENT = contextvars.ContextVar("of_a_client", default=False)  # set where Ray's task of a request would be
DRAINING = RequestRejected("the engine is shutting down", code=ErrorCode.UNAVAILABLE)


def remote(function: Callable[..., Awaitable[object]]) -> SimpleNamespace:
    return SimpleNamespace(remote=lambda *args: asyncio.ensure_future(function(*args)))


class FakeEngine:
    """An attention actor, as far as the client uses it; `calls` tells what came when.

    `admit`: submissions wait for it, as for a grammar that is compiled. `requests` are those that it has taken, by id,
    and `embeddings` those of their images; a submission with `lost` ones fails, as Ray cannot fetch them. With
    `answers_get_lost` it takes a submission, which fails for the client all the same.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.admit = asyncio.Event()
        self.admit.set()
        self.rejection: RequestRejected | None = None
        self.requests: dict[str, Request] = {}
        self.embeddings: dict[str, tuple[object, ...]] = {}
        self.lost: set[object] = set()
        self.answers_get_lost = False
        self.kept_alive: list[str] = []
        self.gateways: set[str] = set()
        self._queue: asyncio.Queue[list[RequestOutput] | None] = asyncio.Queue()
        self._dead = False
        self.submit = remote(self._submit)
        self.abort = remote(self._abort)
        self.keep_alive = remote(self._keep_alive)
        self.outputs = SimpleNamespace(remote=self._outputs)

    async def _submit(self, request: Request, gateway_id: str, *embeddings: object) -> RequestRejected | None:
        assert not OF_A_CLIENT.get(), "it would be cancelled with its client's task"
        await self.admit.wait()
        self._check()
        if self.lost.intersection(embeddings):
            raise ObjectLostError("0" * 56, None, "")
        self.calls.append(f"submit {request.request_id}")
        if self.rejection is None:
            assert gateway_id in self.gateways, "nobody would take its outputs"
            self.requests[request.request_id] = request
            self.embeddings[request.request_id] = embeddings
        if self.answers_get_lost:
            raise RayError
        return self.rejection

    async def _abort(self, request_ids: Sequence[str]) -> int:
        assert not OF_A_CLIENT.get(), "it would be cancelled with its client's task"
        self._check()
        self.calls += [f"abort {request_id}" for request_id in request_ids]
        return sum(request_id in self.requests for request_id in request_ids)

    async def _keep_alive(self, gateway_id: str) -> None:
        self.kept_alive.append(gateway_id)

    async def _outputs(self, gateway_id: str) -> AsyncIterator[Awaitable[list[RequestOutput]]]:
        self.gateways.add(gateway_id)
        while (outputs := await self._queue.get()) is not None:
            yield asyncio.ensure_future(_value(outputs))
        raise RayActorError()

    def _check(self) -> None:
        if self._dead:
            raise RayActorError()

    def send(self, *outputs: RequestOutput) -> None:
        """One step's outputs."""
        self._queue.put_nowait(list(outputs))

    def end(self, name: str, error: RequestError) -> None:
        self.send(RequestOutput(name, finish_reason=FinishReason.ERROR, error=error))

    def die(self) -> None:
        """What it has sent before still comes."""
        self._dead = True
        self._queue.put_nowait(None)


async def _value(outputs: list[RequestOutput]) -> list[RequestOutput]:
    return outputs


class FakeController:
    """Lists `engines`; `put` and `drop` change the list."""

    def __init__(self, **engines: FakeEngine) -> None:
        self._listed = {name: EngineHandle(engine, "first") for name, engine in engines.items()}
        self._changed = asyncio.Condition()
        self._dead = False
        self.changes: list[object] = []  # what it was asked to change
        self.watch_engines = remote(self._watch_engines)
        self.drain = remote(self._drain)
        for name in ("scale", "move", "drain_slot"):
            setattr(self, name, remote(functools.partial(self._change, name)))
        self.rebalance = remote(self._rebalance)

    async def _watch_engines(self, known: Collection[tuple[str, str]]) -> dict[str, EngineHandle]:
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._dead or {(name, one.incarnation) for name, one in self._listed.items()} != set(known)
            )
        if self._dead:
            raise RayActorError()
        return dict(self._listed)

    async def _drain(self) -> int:
        await self._change("drain")
        return 3

    async def _rebalance(self) -> bool:
        await self._change("rebalance")
        return True

    async def _change(self, *what: object) -> None:
        assert not OF_A_CLIENT.get(), "it would be cancelled with its client's task"
        if self._dead:
            raise RayActorError()
        self.changes.append(what)

    async def put(self, name: str, engine: FakeEngine, incarnation: str = "second") -> None:
        async with self._changed:
            self._listed[name] = EngineHandle(engine, incarnation)
            self._changed.notify_all()

    async def drop(self, name: str) -> None:
        async with self._changed:
            del self._listed[name]
            self._changed.notify_all()

    async def die(self) -> None:
        async with self._changed:
            self._dead = True
            self._changed.notify_all()
