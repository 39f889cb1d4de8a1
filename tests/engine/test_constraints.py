"""Grammars, penalties and biases in the whole engine, with a grammar that counts."""

from __future__ import annotations

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from engine.request import ErrorCode, FinishReason, Request, SamplingParams
from tests.engine.counting_grammar import EOS, Cycle
from tests.llama4.reference import reference_logits
from tests.single import SingleProcess


def request(name: str, **params: object) -> Request:
    chosen = SamplingParams(**{"temperature": 0.0, "max_tokens": 12, **params})
    return Request(name, (1, 2, 3, 2, 1), chosen, eos_token_ids=(EOS,))


def run(engine: SingleProcess, one: Request, matcher: Cycle) -> tuple[list[int], FinishReason | None]:
    engine.engine.submit(one, matcher)
    engine.wait([one.request_id])
    outputs = engine.outputs[one.request_id]
    return [token for output in outputs for token in output.token_ids], outputs[-1].finish_reason


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_a_complete_grammar_ends_the_answer(engine, temperature):
    name = f"complete-{temperature}"
    # Even before min_tokens: there is nothing else to come.
    found = run(engine, request(name, temperature=temperature, min_tokens=9), Cycle(5))
    assert found == ([10, 11, 12, 13, 14], FinishReason.STOP)
    assert engine.outputs[name][-1].stop_token_id is None


def test_length_and_end_of_text_still_end_it(engine):
    assert run(engine, request("long", max_tokens=3), Cycle(50)) == ([10, 11, 12], FinishReason.LENGTH)
    biased = request("eos", logit_bias=((EOS, 100.0),), min_tokens=3)
    assert run(engine, biased, Cycle(50, eos_may_follow=True)) == ([10, 11, 12, EOS], FinishReason.STOP)


def test_a_grammar_that_gives_up_fails_its_request_only(engine):
    calm = request("calm", max_tokens=40, ignore_eos=True)
    expected = engine.tokens([request("alone", max_tokens=40, ignore_eos=True)])["alone"]
    engine.engine.submit(calm)
    tokens, reason = run(engine, request("gives-up"), Cycle(50, fail_at=4))
    assert tokens == [10, 11, 12, 13] and reason is FinishReason.ERROR
    error = engine.outputs["gives-up"][-1].error
    assert error.code is ErrorCode.INVALID_ARGUMENT and "too complex" in error.message
    engine.wait(["calm"])
    assert [token for output in engine.outputs["calm"] for token in output.token_ids] == expected


def test_preemption_does_not_touch_constraints(checkpoint):
    params = [{"max_tokens": 30, "repetition_penalty": 1.5}, {"max_tokens": 30, "frequency_penalty": 0.7}] * 3
    answers = []
    for pages in (200, 16):
        single = SingleProcess(checkpoint, page_size=4, pages=pages, max_batch_tokens=24)
        try:
            asked = [request(str(n), ignore_eos=True, **each) for n, each in enumerate(params)]
            single.engine.submit(request("grammar", max_tokens=30), matcher := Cycle(30))
            answers.append(single.tokens(asked))
            single.wait(["grammar"])
            assert matcher.accepted == list(range(10, 40))
            assert (single.scheduler.preemptions > 0) == (pages == 16)
        finally:
            single.close()
    assert answers[0] == answers[1]


def test_repetition_penalty_over_a_whole_answer(checkpoint, engine):
    penalised = request("repetition", repetition_penalty=1.6, ignore_eos=True)
    found = engine.tokens([penalised])["repetition"]
    tokens, processor = list(penalised.prompt_token_ids), RepetitionPenaltyLogitsProcessor(1.6)
    for _ in range(12):
        logits_1V = reference_logits(checkpoint, tokens)[-1:].clone()
        tokens.append(int(processor(torch.tensor([tokens]), logits_1V).argmax()))
    assert found == tokens[5:]
    assert found != engine.tokens([request("plain", ignore_eos=True)])["plain"]


def test_biases_ban_and_force(engine):
    plain = engine.tokens([request("unbiased", ignore_eos=True)])["unbiased"]
    banned = request("banned", logit_bias=tuple((token, -100.0) for token in set(plain)), ignore_eos=True)
    assert not set(engine.tokens([banned])["banned"]) & set(plain)
    assert set(engine.tokens([request("forced", logit_bias=((17, 100.0),))])["forced"]) == {17}


def test_frequency_penalties_spread_an_answer(engine):
    same = {"max_tokens": 60, "ignore_eos": True, "logit_bias": ((17, 30.0),)}
    plain = engine.tokens([request("same", **same)])["same"]
    spread = engine.tokens([request("spread", **same, frequency_penalty=2.0)])["spread"]
    assert plain.count(17) == 60 and spread.count(17) < 40
