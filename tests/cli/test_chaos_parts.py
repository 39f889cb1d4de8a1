"""The parts of `herder chaos` that need no server: counting, comparing, choosing, and knowing what is whole."""

from __future__ import annotations

import asyncio
import random
import signal
import statistics
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, cast

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from cli import chaos_harm
from cli.chaos import seconds
from cli.chaos_harm import ENDING, Action, Hand, Look, choose, in_random_order, is_whole
from cli.chaos_streams import AnswerLost, Prompt, answer, keep_asking, make_prompts, undisturbed
from cli.chaos_tally import Harm, Tally, duration, spread
from cli.endpoint import Server
from cli.report import CliError
from herder.v1 import control_pb2 as pb

# ---- counting


@given(st.lists(st.floats(0, 10), min_size=1, max_size=50))
def test_the_median_gap(lengths: list[float]) -> None:
    tally = Tally(1)
    for length in lengths:
        tally.note_gap(0, 0.0, length)
    assert tally.median_gap == pytest.approx(statistics.median_low(lengths), abs=1e-4)
    assert tally.longest_gaps == [max(lengths)]


@pytest.mark.parametrize(
    ("start", "end", "cause"),
    [
        (1.0, 2.0, None),  # before any harm
        (9.0, 10.4, None),  # mostly before it
        (9.9, 10.4, 0),
        (12.0, 13.0, 0),
        (19.9, 20.5, 1),  # not put down to the harm before
        (12.0, 20.5, 0),  # hung since the first one
        (19.0, 29.0, 1),
        (9.0, 40.0, 2),
    ],
)
def test_what_a_gap_is_put_down_to(start: float, end: float, cause: int | None) -> None:
    tally = Tally(1)
    tally.harms = [Harm("kill-expert", "expert-0", at) for at in (10.0, 20.0, 30.0) if at < end]
    tally.note_gap(0, start, end)
    hit = [number for number, harm in enumerate(tally.harms) if harm.longest_gap]
    assert hit == ([] if cause is None else [cause])
    if cause is not None:
        assert tally.harms[cause].longest_gap == end - start


@pytest.mark.parametrize(
    ("got", "said"),
    [
        ([1, 2, 3], ""),
        ([1, 9, 3], "stream 4: another token at 1 (3 tokens, not 3)"),
        ([1, 2], "stream 4: another token at 2 (2 tokens, not 3)"),
        ([1, 2, 3, 4], "stream 4: another token at 3 (4 tokens, not 3)"),
        ([], "stream 4: another token at 0 (0 tokens, not 3)"),
    ],
)
def test_answers_are_compared_token_by_token(got: list[int], said: str) -> None:
    tally = Tally(5)
    tally.note_answer(4, got, (1, 2, 3))
    assert (tally.answers, tally.tokens, tally.changed) == (not said, len(got), [said] if said else [])


def test_harms_by_action() -> None:
    tally = Tally(1)
    tally.harms = [Harm(action, "expert-0", 0.0) for action in ("stop-expert", "kill-expert", "stop-expert")]
    assert {action: len(harms) for action, harms in tally.by_action.items()} == {"kill-expert": 1, "stop-expert": 2}


def test_times_for_people() -> None:
    assert (duration(0.0852), duration(12.34)) == ("85 ms", "12.3 s")
    assert (spread([]), spread([0.5]), spread([0.1, 0.2, 4.0])) == ("-", "500 ms", "200 ms, worst 4.0 s")


@pytest.mark.parametrize(("text", "value"), [("60s", 60), ("60", 60), ("1.5 m", 90), ("500ms", 0.5), ("2h", 7200)])
def test_times_as_given(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "0s", "-1s", "s", "1d", "1s 2s"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="must be a time such as 60s"):
        seconds(text)


# ---- streams


class Clock:
    """Moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Script:
    """An `Ask`: for each answer its pieces, of (seconds to wait, tokens or a reason to be lost)."""

    def __init__(self, clock: Clock, *answers: Sequence[tuple[float, Sequence[int] | str]]) -> None:
        self.clock = clock
        self.answers = list(answers)

    async def __call__(self, _: Prompt) -> AsyncGenerator[Sequence[int], None]:
        for wait, piece in self.answers.pop(0):
            await asyncio.sleep(0)
            self.clock.now += wait
            if isinstance(piece, str):
                raise AnswerLost(piece)
            yield piece


PROMPT = Prompt((1, 2), None, 3)


async def test_gaps_of_one_answer() -> None:
    clock, tally = Clock(), Tally(2)
    ask = Script(clock, [(1.0, [7]), (0.25, [8, 9]), (0.5, [1])])
    assert await answer(1, PROMPT, ask, tally, clock) == [7, 8, 9, 1]
    assert (tally.longest_gaps, tally.median_gap) == ([0.0, 1.0], 0.5)


async def test_waiting_in_vain_is_a_gap_too() -> None:
    clock, tally = Clock(), Tally(1)
    with pytest.raises(AnswerLost):
        await answer(0, PROMPT, Script(clock, [(0.1, [7]), (5.0, "died")]), tally, clock)
    assert tally.longest_gaps == [5.0]


async def test_what_differs_of_itself_is_not_compared() -> None:
    clock = Clock()
    same, other = [(0.1, [7, 8])], [(0.1, [7, 9])]
    tally = Tally(1)
    assert await undisturbed([PROMPT], Script(clock, same, same), tally, clock) == [[7, 8]]
    assert (tally.answers, tally.tokens) == (1, 2)
    with pytest.raises(CliError, match="other tokens before anything was harmed: stream 0: another token at 1"):
        await undisturbed([PROMPT], Script(clock, same, other), Tally(1), clock)
    with pytest.raises(CliError, match="lost before anything was harmed: died"):
        await undisturbed([PROMPT], Script(clock, [(0.1, "died")]), Tally(1), clock)


async def test_a_stream_goes_on_after_a_lost_answer_and_ends_with_a_whole_one() -> None:
    clock, tally, ending = Clock(), Tally(1), asyncio.Event()
    ask = Script(clock, [(0.1, [7])], [(0.1, "died")], [(0.1, [8])], [(0.1, [7])])
    stream = asyncio.create_task(keep_asking(0, PROMPT, [7], ask, tally, ending, clock))
    while ask.answers:
        await asyncio.sleep(0)
    ending.set()
    await stream
    assert (tally.answers, tally.lost, len(tally.changed)) == (2, Counter({"died": 1}), 1)


@given(st.integers(1, 40), st.integers(1, 300), st.integers(2, 300), st.integers(0, 9))
def test_prompts_fit_and_repeat(count: int, vocab: int, context: int, seed: int) -> None:
    prompts = make_prompts(count, vocab, context, random.Random(seed))
    assert prompts == make_prompts(count, vocab, context, random.Random(seed))
    for number, prompt in enumerate(prompts):
        assert 1 <= len(prompt.token_ids) <= context - prompt.max_tokens and prompt.max_tokens >= 1
        assert all(0 <= token < vocab for token in prompt.token_ids)
        sampling = prompt.request().sampling
        assert (sampling.temperature == 1.0) == sampling.HasField("seed") == bool(number % 2)
        assert sampling.ignore_eos


# ---- harm


def actor(role: int, index: int, pid: int, state: str = "serving", node_id: str = "a") -> pb.ActorInfo:
    name = {1: "attention", 2: "expert", 3: "controller"}[role]
    return pb.ActorInfo(name=f"{name}-{index}", role=role, index=index, pid=pid, state=state, node_id=node_id)


CREW = (actor(1, 0, 10), actor(2, 0, 20), actor(2, 1, 21), actor(3, 0, 30, "ready"))


def test_actions() -> None:
    order = in_random_order(list(Action), random.Random(1))
    assert all(sorted(islice(order, 6)) == sorted(Action) for _ in range(20))
    rng = random.Random(1)
    victims = {action: {choose(action, CREW, rng).pid for _ in range(50)} for action in Action}
    assert victims == {
        Action.KILL_EXPERT: {20, 21},
        Action.STOP_EXPERT: {20, 21},
        Action.KILL_ATTENTION: {10},
        Action.KILL_CONTROLLER: {30},
        Action.DROP_EXPERT: {20, 21},
        Action.DELAY_EXPERT: {20, 21},
    }
    with pytest.raises(CliError, match="kill-controller: the server has no controller actor whose process is known"):
        choose(Action.KILL_CONTROLLER, CREW[:3], rng)


async def test_signals_for_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    monkeypatch.setattr(chaos_harm, "_send_away", lambda actor, number: sent.append((actor.pid, number)))
    away = [pb.ActorInfo(node_ip="192.0.2.1", pid=pid) for pid in (1, 2)]
    hand = Hand()
    await hand.do(Action.KILL_EXPERT, away[0])
    await hand.do(Action.STOP_EXPERT, away[1])
    hand.let_go()
    assert sent == [(1, signal.SIGKILL), (2, signal.SIGSTOP), (2, signal.SIGCONT)]


async def test_messages_are_harmed_by_their_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(chaos_harm, "_harm_messages", lambda *harm: asked.append(harm))
    hand = Hand()
    for action in (Action.DROP_EXPERT, Action.DELAY_EXPERT):
        await hand.do(action, CREW[2])
    hand.let_go()
    assert asked == [(CREW[2], Action.DROP_EXPERT), (CREW[2], Action.DELAY_EXPERT)]
    faults = [action.fault(1) for _, action in asked]
    assert [(fault.action, fault.role, fault.member) for fault in faults] == [
        ("drop", "expert", 1),
        ("delay", "expert", 1),
    ]
    assert set(Action) - set(ENDING) == {Action.DROP_EXPERT, Action.DELAY_EXPERT}


@pytest.mark.parametrize(
    ("now", "whole"),
    [
        (Look(True, "", (CREW[0], actor(2, 0, 99), *CREW[2:]), 8), True),
        (Look(True, "", (CREW[0], actor(2, 0, 20, node_id="b"), *CREW[2:]), 8), True),  # another machine's pid
        (Look(True, "", (CREW[0], actor(2, 0, 99), *CREW[2:], actor(2, 2, 22, "loading")), 9), True),
        (Look(True, "", CREW, 8), False),  # nobody has noticed yet
        (Look(True, "", (CREW[0], *CREW[2:]), 8), False),
        (Look(True, "", (CREW[0], actor(2, 0, 99, "loading"), *CREW[2:]), 8), False),
        (Look(True, "", (actor(1, 0, 10, "no answer"), actor(2, 0, 99), *CREW[2:]), 8), False),
        (Look(True, "", (CREW[0], actor(2, 0, 99), *CREW[2:]), 7), False),  # a replica is missing
        (Look(False, "forming", (CREW[0], actor(2, 0, 99), *CREW[2:]), 8), False),
    ],
)
def test_full_strength(now: Look, whole: bool) -> None:
    assert is_whole(Look(True, "", CREW, 8), now, CREW[1]) is whole


def test_full_strength_when_nobody_was_ended() -> None:
    before = Look(True, "", CREW, 8)
    assert is_whole(before, before, None)
    assert not is_whole(before, Look(True, "", (*CREW[:2], *CREW[3:]), 8), None)


# ---- Ctrl-C


async def test_a_look_heeds_a_cancellation_that_its_call_kept_to_itself() -> None:
    class Stub:
        async def GetServerInfo(self, request: object, **options: object) -> pb.GetServerInfoResponse:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(30)
            return pb.GetServerInfoResponse(ready=True)

        async def GetExpertPlacement(self, request: object, **options: object) -> pb.GetExpertPlacementResponse:
            return pb.GetExpertPlacementResponse()

    watch = chaos_harm.Watch(cast(Any, Stub()), Server("127.0.0.1:1"))
    look = asyncio.create_task(watch.look())
    await asyncio.sleep(0)
    look.cancel()
    with pytest.raises(asyncio.CancelledError):
        await look
