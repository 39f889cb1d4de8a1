"""When a request came to what in an engine."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

from engine.pages import PageTable
from engine.request import (
    ErrorCode,
    ExpertSeconds,
    FinishReason,
    Request,
    RequestError,
    RequestOutput,
    SamplingParams,
    Timeline,
)
from engine.sequence import ScheduledSequence, Sequence
from engine.timeline import Timelines
from tests.single import SingleProcess

TIMED = Request("timed", (1, 2, 3), SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True), timed=True)


def test_an_engine_tells_the_times_of_those_that_ask(engine: SingleProcess) -> None:
    found = engine.run([TIMED, replace(TIMED, request_id="untimed", timed=False)])
    *before, last = found["timed"]
    assert all(output.timeline is None for output in [*before, *found["untimed"]])
    assert last.timeline is not None and last.timeline.started is not None and last.timeline.first_token is not None
    times = [last.timeline.queued, last.timeline.started, last.timeline.first_token, last.timeline.ended]
    assert times == sorted(times) and times[1] < times[3]


def scheduled(request: Request) -> ScheduledSequence:
    return ScheduledSequence(Sequence(request, [1], PageTable({}, {}), (0.0, 0)), 1, False)


def test_times_and_expert_seconds_of_each_phase() -> None:
    clock, spent = count(100.0), iter([ExpertSeconds(1, 2), ExpertSeconds(4, 8), ExpertSeconds(9, 18)])
    timelines = Timelines(lambda: next(clock), lambda: next(spent))
    timelines.queue(TIMED)
    for _ in range(2):  # a prompt in two chunks
        timelines.start([scheduled(TIMED)])
    first, other = RequestOutput("timed", (5,)), RequestOutput("other", (5,), finish_reason=FinishReason.LENGTH)
    assert timelines.stamp([first, other]) == [first, other]
    last = RequestOutput("timed", (6,), finish_reason=FinishReason.LENGTH)
    timeline = Timeline(100.0, 101.0, 102.0, 103.0, ExpertSeconds(3, 6), ExpertSeconds(5, 10))
    assert timelines.stamp([last]) == [replace(last, timeline=timeline)]
    assert timelines.stamp([last]) == [last], "it is forgotten"


def test_a_request_that_never_ran() -> None:
    clock = count(100.0)
    timelines = Timelines(lambda: next(clock))
    timelines.queue(TIMED)
    late = RequestError(ErrorCode.DEADLINE_EXCEEDED, "late")
    (ended,) = timelines.stamp([RequestOutput("timed", finish_reason=FinishReason.ERROR, error=late)])
    assert ended.timeline == Timeline(100.0, None, None, 101.0)
