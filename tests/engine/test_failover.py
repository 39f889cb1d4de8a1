"""Steps that break, rows that are lost, answers that move to another engine: none of it shows in what comes out."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.request import FinishReason, Request, RequestOutput, RequestRejected, SamplingParams
from llama4.moe import Dispatcher
from tests.engine.counting_grammar import Cycle
from tests.engine.faulty_experts import FaultyExperts, FaultyGate, Script
from tests.single import SingleProcess

VOCABULARY = 96
_runs = itertools.count()
KINDS: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0, "logprobs": 2},
    "seeded": {"temperature": 0.9, "top_p": 0.9, "seed": 5},
    "next_seed": {"temperature": 0.9, "top_p": 0.9, "seed": 6},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.8, "presence_penalty": 0.4, "seed": 7},
    "grammar": {"temperature": 1.0, "seed": 8},
    "prompt_logprobs": {"temperature": 0.0, "prompt_logprobs": 1},
    "stops": {"temperature": 0.0, "min_tokens": 4, "stop_token_ids": tuple(range(0, 96, 3))},
}


def make_requests(rng: random.Random, max_tokens: int = 14) -> list[Request]:
    """One of each kind, with prompts of up to three steps."""
    return [
        Request(
            kind,
            tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 50))),
            SamplingParams(max_tokens=max_tokens, **params),
        )
        for kind, params in KINDS.items()
    ]


@dataclass(frozen=True)
class Answer:
    """All that a client gets; of log-probabilities, three digits, as batches of other shapes round otherwise."""

    tokens: tuple[int, ...]
    reason: FinishReason | None
    stop_token: int | None
    logprobs: tuple[tuple[int, float], ...]
    prompt_logprobs: tuple[tuple[int, float] | None, ...]

    def since(self, cut: int) -> Answer:
        """What is left when the first `cut` tokens have come already."""
        return replace(self, tokens=self.tokens[cut:], logprobs=self.logprobs[cut:], prompt_logprobs=())

    def check(self, expected: Answer) -> None:
        assert replace(self, logprobs=(), prompt_logprobs=()) == replace(expected, logprobs=(), prompt_logprobs=())
        for found, wanted in (
            (self.logprobs, expected.logprobs),
            (self.prompt_logprobs[1:], expected.prompt_logprobs[1:]),
        ):
            assert [token for token, _ in found] == [token for token, _ in wanted]
            assert [value for _, value in found] == pytest.approx([value for _, value in wanted], abs=2e-3)


def answer_of(outputs: Sequence[RequestOutput]) -> Answer:
    return Answer(
        tuple(token for output in outputs for token in output.token_ids),
        outputs[-1].finish_reason,
        outputs[-1].stop_token_id,
        tuple((entry.token_id, entry.logprob) for output in outputs for entry in output.logprobs),
        tuple(
            None if entry is None else (entry.token_id, entry.logprob)
            for output in outputs
            for entry in output.prompt_logprobs
        ),
    )


def run(single: SingleProcess, requests: Sequence[Request]) -> dict[str, Answer]:
    for request in requests:
        matcher = Cycle(request.params.max_tokens) if request.request_id.startswith("grammar") else None
        single.engine.submit(request, matcher)
    single.wait([request.request_id for request in requests])
    return {request.request_id: answer_of(single.outputs[request.request_id]) for request in requests}


def run_through(checkpoint: Path, calm: SingleProcess, seed: int, script: Script, **limits: int) -> FaultyExperts:
    """Runs requests calmly and in trouble, and compares; returns the experts that made the trouble."""
    made: list[FaultyExperts] = []

    def wrap(inner: Dispatcher) -> FaultyExperts:
        made.append(FaultyExperts(script, inner))
        return made[0]

    requests = make_requests(random.Random(seed), limits.pop("max_tokens", 14))
    gate = FaultyGate()
    troubled = SingleProcess(checkpoint, page_size=4, max_batch_tokens=24, gate=gate, wrap=wrap, **limits)
    try:
        found = run(troubled, requests)
        load = troubled.engine.load()
    finally:
        troubled.close()
    run_name = f"calm-{next(_runs)}"
    expected = run(calm, [replace(request, request_id=f"{request.request_id}-{run_name}") for request in requests])
    for name, answer in found.items():
        answer.check(expected[f"{name}-{run_name}"])
    assert set(load.kv_pages_used.values()) == {0} and load.parked == load.running == 0
    assert load.generated_tokens == sum(len(answer.tokens) for answer in found.values())
    assert gate.recovered == made[0].broken
    return made[0]


@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), breaks=st.frozensets(st.integers(0, 24), min_size=1))
def test_steps_that_break_do_not_show(checkpoint, engine, seed, breaks):
    """Dispatches come in pairs, one for each MoE layer, but for those of steps that break in their first one."""
    assert run_through(checkpoint, engine, seed, Script(breaks)).broken == len(breaks)


@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), often=st.floats(0.002, 0.03))
def test_lost_rows_do_not_show(checkpoint, engine, seed, often):
    def loses(dispatch: int, row: int) -> bool:
        return random.Random(f"{seed} {dispatch} {row}").random() < often

    run_through(checkpoint, engine, seed, Script(loses=loses))


@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), often=st.floats(0, 0.03), breaks=st.frozensets(st.integers(0, 40)))
def test_two_micro_batches_do_not_show(checkpoint, engine, seed, often, breaks):
    """Nor do lost rows and steps that break between them."""

    def loses(dispatch: int, row: int) -> bool:
        return random.Random(f"{seed} {dispatch} {row}").random() < often

    run_through(checkpoint, engine, seed, Script(breaks, loses), micro_batches=2)


def test_both_beside_preemption_do_not_show(checkpoint, engine):
    script = Script(frozenset(range(5, 100, 9)), loses=lambda dispatch, row: (dispatch * 7 + row) % 41 == 0)
    experts = run_through(checkpoint, engine, 4, script, pages=26, max_tokens=30)
    assert experts.broken > 5 and experts.lost > 5


# ---- answers that move


@pytest.mark.parametrize("seed", range(3))
def test_every_cut_goes_on_as_if_nothing_had_been(checkpoint, engine, seed):
    """On an engine that knows nothing of the request, and on one that has it in its prefix cache."""
    requests = make_requests(random.Random(seed))
    expected = run(engine, [replace(request, request_id=f"{request.request_id}-{seed}") for request in requests])
    resumed: dict[str, tuple[Request, Answer]] = {}
    for request in requests:
        whole = expected[f"{request.request_id}-{seed}"]
        for cut in range(1, len(whole.tokens)):
            for salt in ("", f"{seed} {cut}"):
                name = f"{request.request_id}-{seed}-{cut}-{salt}"
                moved = replace(request, request_id=name, cache_salt=salt, generated_token_ids=whole.tokens[:cut])
                resumed[name] = moved, whole.since(cut)
    assert len(resumed) > 100
    found = run(engine, [request for request, _ in resumed.values()])
    for name, (_, wanted) in resumed.items():
        found[name].check(wanted)
        assert all(output.cached_tokens == 0 for output in engine.outputs[name])


def test_a_grammar_that_did_not_give_these_tokens_is_refused(engine):
    request = Request("other", (1,), SamplingParams(max_tokens=9), generated_token_ids=(10, 12))
    with pytest.raises(RequestRejected, match="do not follow the grammar"):
        engine.engine.submit(request, Cycle(9))
