"""How requests come and go: an engine with a model on paper, whose steps a script drives."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from dispatch.epoch import GroupBroken
from engine.engine import Engine, SoloGate
from engine.request import SHUTTING_DOWN, ErrorCode, FinishReason, Request, RequestOutput, RequestRejected
from engine.sequence import ScheduledSequence
from engine.step import StepResult
from tests.engine.paper_model import Clock, make_request, make_scheduler


@dataclass(frozen=True)
class Answer:
    idle: bool
    leaving: bool
    renewed: bool = False


class ScriptedGate:
    """Does what the script says before the step of that number; when there is nothing more to do, leaves."""

    def __init__(self, script: dict[int, Callable[[], None]]) -> None:
        self.script = script
        self.steps = 0
        self.rung = False
        self.hopeless = False

    def begin(self, rows: int, leaving: bool) -> Answer:
        return Answer(idle=rows == 0, leaving=leaving or (rows == 0 and not self.script and not self.rung))

    def wait(self) -> None:
        assert self.rung or self.script, "nobody would ever ring"
        if not self.rung:
            self.script.pop(min(self.script))()
        self.rung = False

    def ring(self) -> None:
        self.rung = True

    def recover(self, error: GroupBroken) -> None:
        """Until the script says that there is no way on."""
        if self.hopeless:
            raise error


class PaperStepper:
    """Token 1 for everybody."""

    def __init__(self, gate: ScriptedGate) -> None:
        self.gate = gate
        self.expected: set[str] = set()
        self.lost: set[str] = set()  # requests whose experts are out of reach

    def expect(self, request: Request, matcher: object, patches: object) -> None:
        self.expected.add(request.request_id)

    def forget(self, request_id: str) -> None:
        self.expected.remove(request_id)

    def step(self, scheduled: list[ScheduledSequence]) -> StepResult:
        self.gate.steps += 1
        self.gate.script.pop(self.gate.steps, lambda: None)()
        parked = frozenset(item.sequence for item in scheduled if item.sequence.request.request_id in self.lost)
        outputs = []
        for sequence in (item.sequence for item in scheduled if item.completes and item.sequence not in parked):
            sequence.tokens.append(1)
            ends = sequence.generated >= sequence.request.params.max_tokens
            if ends:
                self.forget(sequence.request.request_id)
            reason = FinishReason.LENGTH if ends else None
            outputs.append(RequestOutput(sequence.request.request_id, (1,), finish_reason=reason))
        return StepResult(outputs, parked)


class Run:
    """An engine to be run on this thread."""

    def __init__(self, script: dict[int, Callable[[], None]], **kwargs: int) -> None:
        self.clock = Clock()
        self.scheduler = make_scheduler(clock=self.clock, **kwargs)
        self.gate = ScriptedGate(script)
        self.stepper = PaperStepper(self.gate)
        self.outputs: dict[str, list[RequestOutput]] = defaultdict(list)
        self.ended_at: dict[str, int] = {}
        self.engine = Engine(self.scheduler, self.stepper, self.gate, self._deliver, self.clock)

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            self.outputs[output.request_id].append(output)
            if output.finish_reason is not None:
                self.ended_at[output.request_id] = self.gate.steps

    def tokens(self, name: str) -> int:
        return sum(len(output.token_ids) for output in self.outputs[name])

    def run(self, *requests: Request) -> None:
        for request in requests:
            self.engine.submit(request)
        self.engine.run()
        assert not self.stepper.expected
        assert set(self.engine.load().kv_pages_used.values()) == {0}


@pytest.mark.parametrize("waits", [False, True])
def test_an_abort_frees_pages_before_the_next_step(waits):
    used: list[int] = []
    run = Run(
        {
            5: lambda: run.engine.abort(["goes", "unknown"]),
            6: lambda: used.append(run.engine.load().kv_pages_used["full"]),
        },
        running=1 if waits else 4,
    )
    run.run(make_request("stays", 4, max_tokens=30), make_request("goes", 4, max_tokens=30))
    assert run.outputs["goes"][-1].finish_reason is FinishReason.ABORT and run.ended_at["goes"] == 5
    assert used == [3]  # the pages of one sequence with 9 or 10 tokens
    assert run.tokens("stays") == 30


def test_deadlines_end_those_that_wait_and_those_that_run():
    def late() -> None:
        run.clock.now += 100

    run = Run({5: late}, running=1)
    run.run(
        make_request("runs", 4, max_tokens=30, deadline=1050.0),
        make_request("waits", 4, deadline=1050.0),
        make_request("patient", 4, deadline=5000.0),
    )
    for name in ("runs", "waits"):
        assert run.outputs[name][-1].error.code is ErrorCode.DEADLINE_EXCEEDED and run.ended_at[name] == 5
    assert run.tokens("patient") == 4


def test_a_passed_deadline_ends_a_request_that_does_not_fit_beside_others():
    run = Run({5: lambda: setattr(run.clock, "now", 2000.0)}, pages=10)
    run.run(make_request("runs", 20, max_tokens=20), make_request("large", 36, deadline=1500.0))
    assert run.outputs["large"][-1].error.code is ErrorCode.DEADLINE_EXCEEDED and run.ended_at["large"] == 5
    assert run.tokens("runs") == 20


def test_draining_finishes_what_there_is_and_takes_nothing_more():
    def drain() -> None:
        run.engine.submit(make_request("arrived", 4))
        thread = threading.Thread(target=run.engine.drain)
        thread.start()
        thread.join()
        assert run.engine.drain() == 3 and not run.engine.drained.is_set()
        with pytest.raises(RequestRejected, match="shutting down") as caught:
            run.engine.submit(make_request("late", 4))
        assert caught.value.code is ErrorCode.UNAVAILABLE

    run = Run({3: drain}, running=1)
    run.run(make_request("runs", 4, max_tokens=10), make_request("waits", 4, max_tokens=6))
    assert run.engine.drained.is_set()
    assert [run.tokens(name) for name in ("runs", "waits", "arrived")] == [10, 6, 4]


def test_an_idle_engine_is_drained_at_once():
    run = Run({})
    assert run.engine.drain() == 0 and run.engine.drained.is_set()


def test_drained_comes_after_the_last_output():
    seen: list[bool] = []
    run = Run({1: lambda: run.engine.drain()})
    deliver = run._deliver

    def watch(outputs: list[RequestOutput]) -> None:
        seen.append(run.engine.drained.is_set())
        deliver(outputs)

    run.engine._deliver = watch
    run.run(make_request("one", 4, max_tokens=3))
    assert seen == [False] * 3 and run.engine.drained.is_set()


def test_stopping_while_draining_ends_it():
    run = Run({2: lambda: run.engine.drain(), 3: lambda: run.engine.stop()})
    run.run(make_request("one", 4, max_tokens=30))
    assert run.outputs["one"][-1].error.retryable and run.engine.drained.is_set()


def test_the_load_tells_of_the_cache():
    run = Run({6: lambda: run.engine.submit(make_request("second", prompt))})
    prompt = tuple(range(15))
    run.run(make_request("first", prompt, max_tokens=5))
    load = run.engine.load()
    assert (load.cached_prompt_tokens, load.prompt_tokens) == (12, 15 + 3)
    assert load.kv_pages_cached == {"full": 4} and load.preemptions == 0
    assert load.generated_tokens == 9


def test_a_step_that_breaks_fails_every_request_as_retryable():
    def broken() -> None:
        raise OSError("the group is gone")

    run = Run({3: broken}, running=1)
    with pytest.raises(OSError, match="gone"):
        run.run(make_request("runs", 4, max_tokens=9), make_request("waits", 4))
    for name in ("runs", "waits"):
        error = run.outputs[name][-1].error
        assert error.retryable and error.code is ErrorCode.UNAVAILABLE and "gone" in error.message
    with pytest.raises(RequestRejected, match="gone"):
        run.engine.submit(make_request("late", 1))


def test_a_group_that_breaks_is_tried_again_until_there_is_no_way_on():
    def broken() -> None:
        raise GroupBroken(1, "computing", "a member is gone")

    def hopeless() -> None:
        run.gate.hopeless = True
        broken()

    run = Run({2: broken, 3: broken, 6: hopeless})
    with pytest.raises(GroupBroken, match="gone"):
        run.run(make_request("one", 4, max_tokens=9))
    assert run.tokens("one") == 3  # of five steps two broke
    error = run.outputs["one"][-1].error
    assert error.retryable and error.code is ErrorCode.UNAVAILABLE and error != SHUTTING_DOWN


def test_the_load_tells_what_is_parked_and_its_end_comes_all_the_same():
    def lose() -> None:
        run.stepper.lost = {"aborted", "late"}

    def look() -> None:
        load = run.engine.load()
        seen.append((load.running, load.parked))
        run.engine.abort(["aborted"])
        run.clock.now += 100

    seen: list[tuple[int, int]] = []
    run = Run({3: lose, 6: look})
    run.run(
        *(make_request(name, 4, max_tokens=9, deadline=1050.0) for name in ("aborted", "late")), make_request("x", 4, 9)
    )
    assert seen == [(3, 2)]
    assert run.outputs["aborted"][-1].finish_reason is FinishReason.ABORT and run.tokens("aborted") == 2
    assert run.outputs["late"][-1].error.code is ErrorCode.DEADLINE_EXCEEDED and run.ended_at["late"] == 6
    assert run.tokens("x") == 9


@pytest.mark.timeout(20)
def test_a_deadline_wakes_an_engine_whose_requests_are_all_parked():
    def deliver(outputs: list[RequestOutput]) -> None:
        ended.extend(outputs)
        engine.stop()

    ended: list[RequestOutput] = []
    stepper = PaperStepper(ScriptedGate({}))
    stepper.lost = {"late"}
    engine = Engine(make_scheduler(clock=time.time), stepper, SoloGate(), deliver)
    engine.submit(make_request("late", 4, deadline=time.time() + 0.2))
    engine.run()
    assert ended[0].error.code is ErrorCode.DEADLINE_EXCEEDED
