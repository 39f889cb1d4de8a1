"""The gateway's way to the engines: one stream of outputs from each attention actor, shared by all requests."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from actors.controller import NAME
from actors.status import ClusterStatus
from cluster.launch import NAMESPACE
from engine.request import ErrorCode, FinishReason, Request, RequestError, RequestOutput, RequestRejected

log = logging.getLogger("herder")


@dataclass(slots=True)
class _Open:
    """A request under way on one engine, and its outputs that have not been taken yet."""

    engine: str
    outputs: asyncio.Queue[RequestOutput] = field(default_factory=asyncio.Queue)
    submission: asyncio.Future[RequestRejected | None] | None = None


class RayEngineClient:
    """An `EngineClient` over Ray. Make it with `connect`, inside the event loop that uses it."""

    def __init__(self, controller: ActorHandle, engines: dict[str, ActorHandle]) -> None:
        self._gateway_id = uuid.uuid4().hex
        self._controller = controller
        self._engines = engines
        self._open: dict[str, _Open] = {}
        self._aborts: set[asyncio.Task[None]] = set()  # held, so that they are not collected while they wait
        self._pumps = [asyncio.create_task(self._pump(name, engine)) for name, engine in engines.items()]

    @classmethod
    async def connect(cls) -> RayEngineClient:
        """Finds the deployment's controller and its engines."""
        controller = ray.get_actor(NAME, namespace=NAMESPACE)
        return cls(controller, await controller.engines.remote())

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """See EngineClient.generate. The engine with the fewest open requests of this gateway gets it."""
        if request.request_id in self._open:
            message = f"request_id {request.request_id!r} is in use by a running request"
            raise RequestRejected(message, field="request_id", code=ErrorCode.ALREADY_EXISTS)
        opened = self._open[request.request_id] = _Open(self._pick())
        finished = False
        try:
            await self._submit(request, opened)
            while not finished:
                output = await opened.outputs.get()
                finished = output.finish_reason is not None
                yield output
        except RequestRejected:
            finished = True
            raise
        finally:
            del self._open[request.request_id]
            if not finished:
                task = asyncio.create_task(self._abort_submitted(request.request_id, opened))
                self._aborts.add(task)
                task.add_done_callback(self._aborts.discard)

    def _pick(self) -> str:
        if not self._engines:
            raise RequestRejected("no attention actor is alive", code=ErrorCode.UNAVAILABLE)
        load = dict.fromkeys(self._engines, 0)
        for opened in self._open.values():
            if opened.engine in load:
                load[opened.engine] += 1
        return min(load, key=lambda name: load[name])

    async def _submit(self, request: Request, opened: _Open) -> None:
        submitted = self._engines[opened.engine].submit.remote(request, self._gateway_id)
        opened.submission = asyncio.ensure_future(submitted)
        try:
            # Shielded: when the client goes away meanwhile, the abort has to come after the submission.
            rejection = await asyncio.shield(opened.submission)
        except RayError as error:
            raise RequestRejected(f"{opened.engine} does not answer", code=ErrorCode.UNAVAILABLE) from error
        if rejection is not None:
            raise rejection

    async def _abort_submitted(self, request_id: str, opened: _Open) -> None:
        """Aborts a request whose client has gone. Its submission may still be under way: a grammar takes its time."""
        try:
            if opened.submission is not None:
                await opened.submission
            if opened.engine in self._engines:
                await self._engines[opened.engine].abort.remote([request_id])
        except RayError as error:
            log.debug("no abort request_id=%s actor=%s reason=%s", request_id, opened.engine, error)

    async def abort(self, request_ids: Sequence[str]) -> int:
        """See EngineClient.abort. Asks every engine: the request may have come through another gateway."""
        answers = await asyncio.gather(
            *(engine.abort.remote(list(request_ids)) for engine in self._engines.values()), return_exceptions=True
        )
        return sum(answer for answer in answers if isinstance(answer, int))

    async def drain(self) -> int:
        """See EngineClient.drain."""
        remaining: int = await self._controller.drain.remote()
        return remaining

    async def status(self) -> ClusterStatus:
        """See EngineClient.status."""
        status: ClusterStatus = await self._controller.status.remote()
        return status

    async def _pump(self, name: str, engine: ActorHandle) -> None:
        """Hands each step's outputs to the requests they belong to, until the engine dies."""
        reason = "ended its stream"
        try:
            async for message in engine.outputs.remote(self._gateway_id):
                for output in await message:
                    opened = self._open.get(output.request_id)
                    if opened is not None:  # else its client has gone
                        opened.outputs.put_nowait(output)
        except RayError as error:
            reason = f"died: {str(error).strip().splitlines()[0]}"
        log.error("engine lost actor=%s reason=%s", name, reason)
        del self._engines[name]
        error = RequestError(ErrorCode.UNAVAILABLE, f"{name} {reason}", retryable=True)
        for request_id, opened in self._open.items():
            if opened.engine == name:
                opened.outputs.put_nowait(RequestOutput(request_id, finish_reason=FinishReason.ERROR, error=error))
