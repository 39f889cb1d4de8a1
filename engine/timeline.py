"""When a request came to what in an engine: for those requests that ask for it, and at no cost for the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from engine.request import ExpertSeconds, Request, RequestOutput, Timeline
from engine.sequence import ScheduledSequence


@dataclass(slots=True)
class _Marks:
    """A request's times so far, and what the engine's steps had spent on experts by then."""

    queued: float
    started: float | None = None
    first_token: float | None = None
    experts_before: ExpertSeconds = field(default_factory=ExpertSeconds)
    experts_at_first_token: ExpertSeconds = field(default_factory=ExpertSeconds)


class Timelines:
    """Of the requests under way that are `timed`. `queue` may be called from any thread, the rest from the engine's.

    Args:
        clock: Unix seconds.
        experts: what the engine's steps have spent on experts since it began.
    """

    def __init__(self, clock: Callable[[], float], experts: Callable[[], ExpertSeconds] = ExpertSeconds) -> None:
        self._clock = clock
        self._experts = experts
        self._marks: dict[str, _Marks] = {}

    def queue(self, request: Request) -> None:
        if request.timed:
            self._marks[request.request_id] = _Marks(self._clock())

    def start(self, scheduled: Sequence[ScheduledSequence]) -> None:
        """Before a step."""
        if not self._marks:
            return
        for item in scheduled:
            marks = self._marks.get(item.sequence.request.request_id)
            if marks is not None and marks.started is None:
                marks.started, marks.experts_before = self._clock(), self._experts()

    def stamp(self, outputs: list[RequestOutput]) -> list[RequestOutput]:
        """A step's outputs; the last one of a timed request with its timeline."""
        return [self._stamped(output) for output in outputs] if self._marks else outputs

    def _stamped(self, output: RequestOutput) -> RequestOutput:
        marks = self._marks.get(output.request_id)
        if marks is None:
            return output
        if output.token_ids and marks.first_token is None:
            marks.first_token, marks.experts_at_first_token = self._clock(), self._experts()
        if output.finish_reason is None:
            return output
        del self._marks[output.request_id]
        return replace(output, timeline=self._timeline(marks))

    def _timeline(self, marks: _Marks) -> Timeline:
        ended, experts = self._clock(), self._experts()
        timeline = Timeline(marks.queued, marks.started, marks.first_token, ended)
        if marks.started is None:
            return timeline
        if marks.first_token is None:
            return replace(timeline, prefill=experts.since(marks.experts_before))
        return replace(
            timeline,
            prefill=marks.experts_at_first_token.since(marks.experts_before),
            decode=experts.since(marks.experts_at_first_token),
        )
