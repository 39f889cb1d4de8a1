"""The gateway's way to the engines: requests go to one of them, and on to another when it is lost.

For every open request the client keeps its journal: the prompt and the tokens that it has passed on. When an engine
dies, or ends a request because it ends itself, the request goes to another one with these tokens, and its stream just
goes on. What a lost engine still sends is dropped: outputs count only if they come through the link that the request
is at. Images are encoded before a request goes to an engine, and again if the embeddings are lost on the way.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Literal

import ray
from ray.actor import ActorHandle
from ray.exceptions import ObjectLostError, RayActorError, RayError
from ray.serve.handle import DeploymentHandle

from actors.controller_client import ControllerClient
from actors.current_span import current_span
from actors.engine_links import EngineLink, EngineLinks
from actors.engine_spans import EngineSpans
from actors.open_request import OpenRequest
from actors.reasons import first_line
from actors.vision_client import VisionClient
from cluster.launch import CONTROLLER, NAMESPACE
from engine.request import (
    GATEWAY_SILENT,
    SHUTTING_DOWN,
    ErrorCode,
    FinishReason,
    Request,
    RequestError,
    RequestOutput,
    RequestRejected,
)

log = logging.getLogger("herder")

_BUSY_TIMEOUT_S = 30.0  # so long an answer that has begun waits for room at the other engines
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.05, 1.0
# A request may be what its engines die of: after so many in a row that gave it no token, it goes to no other.
_MOST_FRUITLESS = 3
_MOST_ENCODINGS = 5  # of a request's images, whose embeddings get lost with the encoder's replica

_Offer = Literal["taken", "busy", "refused", "nobody"]


class RayEngineClient(ControllerClient):
    """An `EngineClient` over Ray. Make it with `connect`, inside the event loop that uses it.

    Args:
        find_controller: see EngineLinks.
        new_seed: a seed for each request that has none, drawn here so that an answer that moves stays the same.
        failover_timeout_s: so long an answer that has begun waits while no engine is alive.
        vision: the image encoder; without one, requests have no images.
    """

    def __init__(
        self,
        find_controller: Callable[[], ActorHandle],
        new_seed: Callable[[], int] = lambda: random.SystemRandom().getrandbits(63),
        failover_timeout_s: float = 60.0,
        vision: VisionClient | None = None,
    ) -> None:
        super().__init__(EngineLinks(find_controller, self._take, self._fail))
        self._vision = vision
        self._new_seed = new_seed
        self._failover_timeout_s = failover_timeout_s
        self._open: dict[str, OpenRequest] = {}
        self._spans = EngineSpans()
        self._aborts: set[asyncio.Task[None]] = set()  # held, so that they are not collected while they wait

    @classmethod
    async def connect(
        cls, encoder: DeploymentHandle | None, cache_bytes: int, encode_timeout_s: float
    ) -> RayEngineClient:
        """Finds the deployment's controller and its engines. About its image encoder, if any: see VisionClient."""
        vision = None if encoder is None else VisionClient.of(encoder, cache_bytes, encode_timeout_s)
        client = cls(lambda: ray.get_actor(CONTROLLER, namespace=NAMESPACE), vision=vision)
        await client.start()
        return client

    async def start(self) -> None:
        """Connects to the engines. Raises ValueError or RayError without a controller."""
        await self._links.start()

    # ---- requests

    async def generate(self, request: Request, images: Sequence[bytes] = ()) -> AsyncGenerator[RequestOutput, None]:
        """See EngineClient.generate. The engine with the fewest open requests of this gateway gets it."""
        if request.request_id in self._open:
            message = f"request_id {request.request_id!r} is in use by a running request"
            raise RequestRejected(message, field="request_id", code=ErrorCode.ALREADY_EXISTS)
        if request.params.seed is None:
            request = replace(request, params=replace(request.params, seed=self._new_seed()))
        opened = self._open[request.request_id] = OpenRequest(request, tuple(images))
        finished = False
        try:
            if images:
                opened.moving = True
                await self._encode(opened)
                opened.moving = False
                if opened.aborted:
                    finished = True
                    yield RequestOutput(request.request_id, finish_reason=FinishReason.ABORT)
                    return
            await self._admit(opened)
            while not finished:
                output = await opened.outputs.get()
                if _engine_is_lost(output):
                    last = await self._go_on(opened, output)
                    if last is None:
                        continue
                    output = last
                finished = output.finish_reason is not None
                opened.tokens += output.token_ids
                yield output
        except RequestRejected:
            finished = True
            raise
        finally:
            del self._open[request.request_id]
            if not finished and opened.link is not None:
                task = asyncio.create_task(_abort_submitted(request.request_id, opened.link, opened.submission))
                self._aborts.add(task)
                task.add_done_callback(self._aborts.discard)
            self._put(opened, None)

    async def _encode(self, opened: OpenRequest) -> None:
        """Has its images encoded, as far as they are not. Raises RequestRejected, as VisionClient.embeddings does."""
        assert self._vision is not None, "requests have no images where there is no encoder"
        deadline, span = opened.request.deadline, current_span()
        encoding = nullcontext() if span is None else span.child("encode images", images=len(opened.images))
        try:
            async with asyncio.timeout(None if deadline is None else deadline - time.time()):
                with encoding as traceparent:
                    opened.embeddings = await self._vision.embeddings(opened.digests, opened.images, traceparent)
        except TimeoutError:
            message = "the request's deadline passed while its images were encoded"
            raise RequestRejected(message, code=ErrorCode.DEADLINE_EXCEEDED) from None

    async def _admit(self, opened: OpenRequest) -> None:
        """What has not begun is refused rather than kept waiting. Raises RequestRejected."""
        refusal = RequestRejected("no attention actor is alive", code=ErrorCode.UNAVAILABLE)
        for link in self._links.by_load():
            answer = await self._submit(opened, link)
            if answer is None:
                return
            refusal = answer
            if refusal.code is not ErrorCode.UNAVAILABLE:
                break
        raise refusal

    async def _go_on(self, opened: OpenRequest, end: RequestOutput) -> RequestOutput | None:
        """Brings a request whose engine is lost to another one. Returns its last output if that cannot be."""
        assert opened.link is not None and end.error is not None
        if end.error != GATEWAY_SILENT:  # this engine lives, and takes it back
            opened.left.add(opened.link)
        opened.fruitless = opened.fruitless + 1 if len(opened.tokens) == opened.tokens_before else 0
        opened.tokens_before = len(opened.tokens)
        if opened.fruitless == _MOST_FRUITLESS:
            return end
        opened.moving = True
        try:
            if await self._find_taker(opened, wait_for_engines=end.error != SHUTTING_DOWN):
                return None
        finally:
            opened.moving = False
        if opened.aborted:
            return RequestOutput(opened.request.request_id, finish_reason=FinishReason.ABORT)
        return end

    async def _find_taker(self, opened: OpenRequest, wait_for_engines: bool) -> bool:
        """Offers the request around until an engine has taken it; False if there is none to be hoped for."""
        start, pause = time.monotonic(), _FIRST_PAUSE_S
        deadline_s = float("inf") if opened.request.deadline is None else opened.request.deadline - time.time()
        patience_s = {"busy": _BUSY_TIMEOUT_S, "nobody": self._failover_timeout_s * wait_for_engines}
        while not opened.aborted:
            arrival = self._links.arrival  # one that comes during the offer counts
            offer = await self._offer(opened)
            waited = time.monotonic() - start
            if offer == "taken":
                log.info("request moved request_id=%s tokens=%d", opened.request.request_id, len(opened.tokens))
                if (span := current_span()) is not None and opened.link is not None:
                    span.event("moved", engine=opened.link.name, tokens=len(opened.tokens))
                return True
            left = min(patience_s.get(offer, 0.0), deadline_s) - waited
            if left <= 0:
                return False
            try:
                await asyncio.wait_for(arrival.wait(), min(pause, left))
            except TimeoutError:
                pause = min(2 * pause, _LAST_PAUSE_S)
        return False

    async def _offer(self, opened: OpenRequest) -> _Offer:
        """Asks each engine once: `busy` if any may have room later, else `refused` if any takes nothing any more."""
        found: _Offer = "nobody"
        for link in self._links.by_load():
            if link in opened.left:
                continue
            refusal = await self._submit(opened, link)
            if refusal is None:
                if opened.aborted:  # meanwhile, when no engine knew of it
                    link.abort([opened.request.request_id])
                return "taken"
            # Its earlier life at an engine that was out of reach may not have ended there yet.
            if refusal.code in (ErrorCode.RESOURCE_EXHAUSTED, ErrorCode.ALREADY_EXISTS):
                found = "busy"
            elif self._links.is_up(link) and found == "nobody":
                found = "refused"
        return found

    async def _submit(self, opened: OpenRequest, link: EngineLink) -> RequestRejected | None:
        """Submits a request with its journal; returns why not, if the engine does not take it."""
        self._put(opened, link)
        self._spans.expect(link, opened.request.request_id)
        for _ in range(_MOST_ENCODINGS):
            opened.submission = asyncio.ensure_future(link.submit(opened.rest(), opened.embeddings))
            try:
                # Shielded: when the client goes away meanwhile, the abort has to come after the submission.
                refusal = await asyncio.shield(opened.submission)
                if refusal is not None:
                    self._spans.forget(link, opened.request.request_id)
                return refusal
            except ObjectLostError as error:
                log.warning("images lost request_id=%s reason=%s", opened.request.request_id, first_line(error))
                if (refusal := await self._encode_anew(opened)) is not None:
                    return refusal
            except RayActorError as error:
                self._links.lose(link, f"does not answer: {first_line(error)}")
                break
            except RayError as error:
                log.error("not submitted request_id=%s reason=%s", opened.request.request_id, error)
                break
        else:
            return RequestRejected("the embeddings of its images get lost again and again", code=ErrorCode.UNAVAILABLE)
        return RequestRejected(f"{link.name} does not answer", code=ErrorCode.UNAVAILABLE)

    async def _encode_anew(self, opened: OpenRequest) -> RequestRejected | None:
        """After its embeddings were lost; returns why there are no others."""
        assert self._vision is not None
        self._vision.forget(opened.digests)
        try:
            await self._encode(opened)
        except RequestRejected as refusal:
            return refusal
        return None

    def _put(self, opened: OpenRequest, link: EngineLink | None) -> None:
        """From now on the request is at this link, and only what comes through it counts."""
        before, opened.link, opened.outputs = opened.link, link, asyncio.Queue()
        if link is not None:
            link.open += 1
        if before is not None:
            before.open -= 1
            self._links.release(before)

    def _take(self, link: EngineLink, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            self._spans.end(link, output)
            opened = self._open.get(output.request_id)
            if opened is not None and opened.link is link:  # else its client has gone, or it has moved
                opened.outputs.put_nowait(output)

    def _fail(self, link: EngineLink, reason: str) -> None:
        error = RequestError(ErrorCode.UNAVAILABLE, f"{link.name} {reason}", retryable=True)
        for request_id, opened in self._open.items():
            if opened.link is link:
                opened.outputs.put_nowait(RequestOutput(request_id, finish_reason=FinishReason.ERROR, error=error))

    async def abort(self, request_ids: Sequence[str]) -> int:
        """See EngineClient.abort. Asks every engine: the request may have come through another gateway."""
        mine = [self._open[request_id] for request_id in request_ids if request_id in self._open]
        moving = len([opened for opened in mine if opened.moving])
        for opened in mine:
            opened.aborted = True
        answers = await asyncio.gather(*(link.abort(request_ids) for link in self._links.all()), return_exceptions=True)
        return moving + sum(answer for answer in answers if isinstance(answer, int))


def _engine_is_lost(output: RequestOutput) -> bool:
    """Whether the request ended for no reason of its own."""
    return output.error is not None and output.error.retryable and output.error.code is ErrorCode.UNAVAILABLE


async def _abort_submitted(
    request_id: str, link: EngineLink, submission: asyncio.Future[RequestRejected | None] | None
) -> None:
    """Aborts a request whose client has gone. Its submission may still be under way: a grammar takes its time."""
    if submission is not None:
        with suppress(RayError):  # even then the engine may have it
            await submission
    try:
        await link.abort([request_id])
    except RayError as error:
        log.debug("no abort request_id=%s actor=%s reason=%s", request_id, link.name, error)
