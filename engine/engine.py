"""The engine: requests in, one list of outputs per step out. An attention actor is one of these on a thread.

`submit`, `abort`, `drain`, `stop`, `limit_waiting` and `load` may be called from any thread; everything else happens in
`run`.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from dispatch.epoch import GroupBroken
from dispatch.gate import StepAnswer
from engine.grammar import Matcher, replay
from engine.patches import PromptPatches
from engine.request import SHUTTING_DOWN, EngineLoad, ErrorCode, FinishReason, Request, RequestError, RequestOutput
from engine.scheduler import Scheduler
from engine.sequence import ScheduledSequence
from engine.step import Stepper
from engine.timeline import Timelines

_RATE_WINDOW_S = 5.0


class StepGate(Protocol):
    """Says when there is a step: an engine that shares experts with others must step when any of them does."""

    def begin(self, rows: int, leaving: bool) -> GateAnswer:
        """Offers `rows` for the next step. Every member of the gate calls it, and all get the same answer.

        Raises GroupBroken when the others cannot be reached.
        """

    def wait(self) -> None:
        """Blocks, without using the CPU, until some member rings. Only after an idle answer."""

    def ring(self) -> None:
        """Ends everybody's wait. May be called from any thread, at any time."""

    def recover(self, error: GroupBroken) -> None:
        """After `begin`, `wait` or a step raised `error`: returns when steps can be tried again, raises if never."""


class GateAnswer(Protocol):
    @property
    def idle(self) -> bool:
        """Nobody has rows: there is no step."""

    @property
    def leaving(self) -> bool:
        """Some member leaves: there is no step, and there will be none with these members."""

    @property
    def renewed(self) -> bool:
        """Experts that were out of reach may be back: sequences that wait for them are to be tried again.

        The wait that may follow returns at once.
        """


class SoloGate:
    """The gate of an engine that shares its experts with nobody."""

    def __init__(self) -> None:
        self._rung = threading.Event()

    def begin(self, rows: int, leaving: bool) -> GateAnswer:
        return StepAnswer(idle=rows == 0, leaving=leaving)

    def wait(self) -> None:
        self._rung.wait()
        self._rung.clear()

    def ring(self) -> None:
        self._rung.set()

    def recover(self, error: GroupBroken) -> None:
        raise error


class Engine:
    """Scheduler, model and sampler of one attention actor.

    Args:
        gate: when to step; see `StepGate`.
        deliver: gets the outputs of each step, on the engine's thread; must not block.
        timelines: of the requests that are timed.

    Attributes:
        drained: set when, after `drain`, the last request has ended and its last output is delivered.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        stepper: Stepper,
        gate: StepGate,
        deliver: Callable[[list[RequestOutput]], None],
        clock: Callable[[], float] = time.time,
        timelines: Timelines | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._stepper = stepper
        self._gate = gate
        self._deliver = deliver
        self._clock = clock
        self._timelines = timelines or Timelines(clock)
        self._lock = threading.Lock()
        self.drained = threading.Event()
        self._arrived: list[tuple[Request, Matcher | None, PromptPatches | None]] = []
        self._aborted: dict[RequestError | None, list[str]] = {}  # by how they end
        self._known: set[str] = set()
        self._failure: RequestError | None = None  # why nothing is admitted any more
        self._draining = False
        self._leaving = False
        self._steps = 0
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._recent: deque[tuple[float, int]] = deque()

    # ---- from any thread

    def submit(self, request: Request, matcher: Matcher | None = None, patches: PromptPatches | None = None) -> None:
        """Queues a request. Its tokens will be those that `matcher`, a new one, lets through.

        `patches`: what its images have become; None if it has none.
        Raises RequestRejected when it is not taken.
        """
        if matcher is not None:
            replay(matcher, request.generated_token_ids)
        with self._lock:
            if self._failure is not None:
                raise self._failure.rejection()
            if self._draining and not request.generated_token_ids:  # what has begun elsewhere is finished
                raise SHUTTING_DOWN.rejection()
            if request.request_id in self._known:
                raise RequestError(
                    ErrorCode.ALREADY_EXISTS, f"request_id {request.request_id!r} is in use by a running request"
                ).rejection(field="request_id")
            self._scheduler.check(request, queued=len(self._arrived) + len(self._scheduler.waiting))
            self._known.add(request.request_id)
            self._timelines.queue(request)
            self._arrived.append((request, matcher, patches))
        self._gate.ring()

    def abort(self, request_ids: Sequence[str], error: RequestError | None = None) -> int:
        """Ends these requests before the next step, with finish reason `abort` or with an error.

        Returns how many were known.
        """
        with self._lock:
            known = [request_id for request_id in request_ids if request_id in self._known]
            self._aborted.setdefault(error, []).extend(known)
        if known:
            self._gate.ring()
        return len(known)

    def drain(self) -> int:
        """Admits nothing any more; returns how many requests are still to be finished. See `drained`."""
        with self._lock:
            self._draining = True
            if not self._known:
                self.drained.set()
            return len(self._known)

    def stop(self) -> None:
        """Makes `run` return; requests that are under way fail as retryable."""
        self._leaving = True
        self._gate.ring()

    def limit_waiting(self, max_waiting: int) -> None:
        """From now on so many requests may wait; those that do stay."""
        self._scheduler.limits = replace(self._scheduler.limits, max_waiting=max_waiting)

    def load(self) -> EngineLoad:
        """What the engine is doing right now."""
        now, scheduler = self._clock(), self._scheduler
        with self._lock:
            recent = sum(n for at, n in self._recent if at > now - _RATE_WINDOW_S)
        return EngineLoad(
            waiting=len(self._arrived) + len(scheduler.waiting),
            running=len(scheduler.running),
            parked=len(scheduler.parked),
            draining=self._draining,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            tokens_per_second=recent / _RATE_WINDOW_S,
            kv_pages_used=scheduler.pages.used(),
            kv_pages_total=scheduler.pages.total(),
            cached_prompt_tokens=scheduler.cached_prompt_tokens,
            preemptions=scheduler.preemptions,
            kv_pages_cached=scheduler.pages.cached(),
        )

    # ---- the engine's own thread

    def run(self) -> None:
        """Steps until `stop`, or until another member of the gate leaves. What it raises has failed every request."""
        try:
            leaving = False
            while not leaving:
                self._take_arrivals()
                try:
                    leaving = self._turn()
                except GroupBroken as error:  # nothing has advanced: the same step is scheduled again
                    self._gate.recover(error)
            self._fail(SHUTTING_DOWN)
        except BaseException as error:
            reason = f"the engine stopped: {error}"
            self._fail(RequestError(ErrorCode.UNAVAILABLE, reason, retryable=True))
            raise

    def _turn(self) -> bool:
        """One step, or one wait for work; returns whether to leave instead."""
        scheduled = self._scheduler.schedule()
        answer = self._gate.begin(sum(item.rows for item in scheduled), self._leaving)
        if answer.renewed:
            self._scheduler.unpark()
        if answer.leaving:
            return True
        if answer.idle:
            self._wait()
        else:
            self._step(scheduled)
        return False

    def _wait(self) -> None:
        """Until somebody rings. What is parked has deadlines, and these ring as well."""
        if not self._scheduler.parked or math.isinf(self._scheduler.next_deadline):
            self._gate.wait()
            return
        alarm = threading.Timer(max(0.0, self._scheduler.next_deadline - self._clock()), self._gate.ring)
        alarm.daemon = True
        alarm.start()
        try:
            self._gate.wait()
        finally:
            alarm.cancel()

    def _step(self, scheduled: Sequence[ScheduledSequence]) -> None:
        self._timelines.start(scheduled)
        result = self._stepper.step(scheduled)
        computed = [item for item in scheduled if item.sequence not in result.parked]
        self._count(computed, result.outputs)
        self._scheduler.park(result.parked)
        self._scheduler.advance(computed)
        for output in result.outputs:
            if output.finish_reason is not None:
                self._scheduler.finish(self._scheduler.running[output.request_id])
        self._send(result.outputs)

    def _take_arrivals(self) -> None:
        with self._lock:
            arrived, self._arrived = self._arrived, []
            aborted, self._aborted = self._aborted, {}
            for request, matcher, patches in arrived:
                self._scheduler.add(request)
                self._stepper.expect(request, matcher, patches)
        late = RequestError(ErrorCode.DEADLINE_EXCEEDED, "the request's deadline has passed")
        for error, request_ids in aborted.items():
            self._end(request_ids, FinishReason.ABORT if error is None else FinishReason.ERROR, error)
        self._end(self._scheduler.overdue(), FinishReason.ERROR, late)

    def _end(self, request_ids: Sequence[str], reason: FinishReason, error: RequestError | None) -> None:
        if not request_ids:
            return
        removed = [sequence.request.request_id for sequence in self._scheduler.remove(request_ids)]
        for request_id in removed:
            self._stepper.forget(request_id)
        self._send([RequestOutput(request_id, finish_reason=reason, error=error) for request_id in removed])

    def _fail(self, error: RequestError) -> None:
        with self._lock:
            self._failure = error
            arrived, self._arrived = self._arrived, []
            unseen = [request.request_id for request, _, _ in arrived]
            under_way = self._known.difference(unseen)
        self._end(sorted(under_way), FinishReason.ERROR, error)
        self._send([RequestOutput(name, finish_reason=FinishReason.ERROR, error=error) for name in unseen])

    def _send(self, outputs: list[RequestOutput]) -> None:
        finished = [output.request_id for output in outputs if output.finish_reason is not None]
        with self._lock:
            self._known.difference_update(finished)
        if outputs:
            self._deliver(self._timelines.stamp(outputs))
        if finished:
            with self._lock:
                if self._draining and not self._known:
                    self.drained.set()

    def _count(self, scheduled: Sequence[ScheduledSequence], outputs: list[RequestOutput]) -> None:
        now = self._clock()
        generated = sum(len(output.token_ids) for output in outputs)
        self._steps += 1
        self._generated_tokens += generated
        for item in scheduled:
            left = len(item.sequence.request.prompt_token_ids) - item.sequence.computed
            self._prompt_tokens += max(0, min(item.rows, left))
        with self._lock:
            self._recent.append((now, generated))
            while self._recent[0][0] < now - _RATE_WINDOW_S:
                self._recent.popleft()
