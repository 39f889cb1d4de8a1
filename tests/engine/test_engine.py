"""The whole engine in one process, against transformers: batching, pages and preemption do not show in the tokens."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.request import GATEWAY_SILENT, ErrorCode, FinishReason, Request, RequestRejected, SamplingParams
from tests.llama4.reference import reference_logits
from tests.single import SingleProcess

VOCABULARY = 96


def request(name: str, prompt: list[int], **params: object) -> Request:
    return Request(name, tuple(prompt), SamplingParams(**{"temperature": 0.0, "max_tokens": 12, **params}))


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    lengths = torch.randint(1, 60, (count,), generator=generator).tolist()
    return [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def greedy(path: Path, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(reference_logits(path, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def test_batched_greedy_tokens_are_those_of_transformers(checkpoint, engine):
    asked = [request(f"greedy-{n}", prompt) for n, prompt in enumerate(prompts(8))]
    found = engine.tokens(asked)
    for one in asked:
        assert found[one.request_id] == greedy(checkpoint, list(one.prompt_token_ids), 12)


def test_preemption_does_not_change_tokens(checkpoint, engine):
    asked = [request(f"calm-{n}", prompt, max_tokens=30) for n, prompt in enumerate(prompts(8))]
    expected = engine.tokens(asked)
    tight = SingleProcess(checkpoint, page_size=4, pages=26, max_batch_tokens=16)
    try:
        found = tight.tokens(asked)
        assert tight.scheduler.preemptions > 0
    finally:
        tight.close()
    assert found == expected


def test_sampled_tokens_depend_on_the_seed_alone(engine):
    prompt = prompts(1)[0]
    mine = request("seeded", prompt, temperature=0.9, top_p=0.9, seed=5)
    alone = engine.tokens([mine])["seeded"]
    others = [request(f"noise-{n}", other, temperature=1.5) for n, other in enumerate(prompts(6))]
    again = replace(mine, request_id="seeded-again")
    assert engine.tokens([*others[:3], again, *others[3:]])["seeded-again"] == alone
    other_seed = request("other-seed", prompt, temperature=0.9, top_p=0.9, seed=6)
    assert engine.tokens([other_seed])["other-seed"] != alone


def test_prompt_logprobs_without_generation(checkpoint, engine):
    prompt = prompts(5)[4]
    outputs = engine.run([request("echo", prompt, max_tokens=0, prompt_logprobs=2)])["echo"]
    assert len(outputs) == 1 and outputs[0].finish_reason is FinishReason.LENGTH and outputs[0].token_ids == ()
    expected = reference_logits(checkpoint, prompt).log_softmax(-1)
    entries = outputs[0].prompt_logprobs
    assert len(entries) == len(prompt) and entries[0] is None
    for position in range(1, len(prompt)):
        entry = entries[position]
        assert entry.token_id == prompt[position] and len(entry.top) == 2
        assert abs(entry.logprob - float(expected[position - 1, prompt[position]])) < 1e-4


def test_logprobs_of_generated_tokens(checkpoint, engine):
    prompt = [5, 6, 7]
    outputs = engine.run([request("scored", prompt, logprobs=3, max_tokens=4)])["scored"]
    tokens = list(prompt)
    for entry in (entry for output in outputs for entry in output.logprobs):
        expected = reference_logits(checkpoint, tokens)[-1].log_softmax(-1)
        assert abs(entry.logprob - float(expected[entry.token_id])) < 1e-4
        assert [token for token, _ in entry.top] == expected.topk(3).indices.tolist()
        tokens.append(entry.token_id)
    assert len(tokens) == 7


def test_stop_tokens_min_tokens_and_ignore_eos(engine):
    prompt = [9, 8, 7]
    free = engine.tokens([request("free", prompt, max_tokens=10)])["free"]
    eos = free[3]
    first = free.index(eos)
    base = replace(request("eos", prompt, max_tokens=10), eos_token_ids=(eos,))
    ended = engine.run([base])["eos"]
    assert [token for output in ended for token in output.token_ids] == free[: first + 1]
    assert ended[-1].finish_reason is FinishReason.STOP and ended[-1].stop_token_id == eos
    ignoring = replace(base, request_id="ignoring", params=replace(base.params, ignore_eos=True))
    assert engine.tokens([ignoring])["ignoring"] == free
    longer = replace(base, request_id="longer", params=replace(base.params, min_tokens=8))
    tokens = engine.tokens([longer])["longer"]
    assert len(tokens) >= 8 and eos not in tokens[:7]


def test_abort_frees_the_request_and_leaves_others_alone(engine):
    prompt = prompts(3)[2]
    expected = engine.tokens([request("calm", prompt, max_tokens=100)])["calm"]
    engine.engine.submit(request("goes", prompt, max_tokens=200))
    engine.engine.submit(request("stays", prompt, max_tokens=100))
    while not engine.outputs["goes"]:
        time.sleep(0.001)
    assert engine.engine.abort(["goes", "unknown"]) == 1
    engine.wait(["goes", "stays"])
    assert engine.outputs["goes"][-1].finish_reason is FinishReason.ABORT
    assert [token for output in engine.outputs["stays"] for token in output.token_ids] == expected
    assert set(engine.engine.load().kv_pages_used.values()) == {0}


def test_an_abort_with_an_error_is_that_error(engine):
    engine.engine.submit(request("given up", prompts(1)[0], max_tokens=200))
    assert engine.engine.abort(["given up"], GATEWAY_SILENT) == 1
    engine.wait(["given up"])
    end = engine.outputs["given up"][-1]
    assert (end.finish_reason, end.error) == (FinishReason.ERROR, GATEWAY_SILENT)


def test_a_deadline_ends_the_request(engine):
    late = replace(request("late", [1, 2], max_tokens=100), deadline=time.time() - 1)
    output = engine.run([late])["late"][-1]
    assert output.finish_reason is FinishReason.ERROR and output.error.code is ErrorCode.DEADLINE_EXCEEDED


def test_what_cannot_run_is_rejected(engine):
    with pytest.raises(RequestRejected, match="room for 512") as caught:
        engine.engine.submit(request("huge", [1] * 500, max_tokens=100))
    assert caught.value.field == "max_tokens"
    engine.engine.submit(request("twice", [1], max_tokens=100))
    with pytest.raises(RequestRejected, match="twice") as caught:
        engine.engine.submit(request("twice", [1]))
    assert caught.value.code is ErrorCode.ALREADY_EXISTS
    engine.wait(["twice"])


def test_stopping_fails_what_is_under_way_as_retryable(checkpoint):
    single = SingleProcess(checkpoint, page_size=4, pages=128)
    single.engine.submit(request("cut", [1, 2, 3], max_tokens=200))
    while not single.outputs["cut"]:
        time.sleep(0.001)
    single.close()
    assert single.outputs["cut"][-1].error.retryable
    with pytest.raises(RequestRejected) as caught:
        single.engine.submit(request("after", [1]))
    assert caught.value.code is ErrorCode.UNAVAILABLE
