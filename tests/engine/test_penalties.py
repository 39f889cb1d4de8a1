"""Penalties and biases: against transformers' processors and OpenAI's definition, in groups and alone."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from engine.penalties import Penalties, apply_penalties
from engine.request import SamplingParams
from engine.sampler import SampleRow, sample

VOCABULARY = 300


def penalties(params: SamplingParams, prompt: list[int], generated: list[int]) -> Penalties:
    found = Penalties.of(params, prompt)
    assert found is not None
    for token in generated:
        found.add(token)
    return found


def adjusted(logits_V: Tensor, params: SamplingParams, prompt: list[int], generated: list[int]) -> Tensor:
    logits_NV = logits_V[None].clone()
    apply_penalties(logits_NV, [(0, penalties(params, prompt, generated))])
    return logits_NV[0]


def random_case(seed: int) -> tuple[Tensor, SamplingParams, list[int], list[int]]:
    rng = random.Random(seed)
    params = SamplingParams(
        max_tokens=500,
        temperature=rng.choice([0.0, 0.8]),
        repetition_penalty=rng.choice([1.0, 1.3, 0.7]),
        presence_penalty=rng.choice([0.0, 0.5, -1.0]),
        frequency_penalty=rng.choice([0.0, 0.25, -0.1]),
        logit_bias=tuple((token, rng.uniform(-5, 5)) for token in rng.sample(range(VOCABULARY), 5)),
    )
    logits_V = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3
    prompt, generated = (rng.choices(range(VOCABULARY), k=rng.randint(1, 200)) for _ in range(2))
    return logits_V, params, prompt, generated


@pytest.mark.parametrize("penalty", [0.5, 1.2, 2.0])
def test_repetition_is_that_of_transformers(penalty):
    logits_V, _, prompt, generated = random_case(1)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    expected_V = processor(torch.tensor([prompt + generated]), logits_V[None].clone())[0]
    params = SamplingParams(repetition_penalty=penalty)
    assert torch.equal(adjusted(logits_V, params, prompt, generated), expected_V)


def test_presence_and_frequency_count_the_answer_only():
    logits_V = torch.zeros(6)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    found = adjusted(logits_V, params, prompt=[0, 1, 1], generated=[1, 2, 2, 2, 4])
    assert found.tolist() == [0, -0.75, -1.25, 0, -0.75, 0]


def test_biases_are_added_first():
    params = SamplingParams(logit_bias=((1, 3.0), (2, -100.0)), repetition_penalty=2.0)
    assert adjusted(torch.ones(4), params, prompt=[1, 3], generated=[]).tolist() == [1.0, 2.0, -99.0, 0.5]


def test_nothing_to_do_is_said_as_such():
    assert Penalties.of(SamplingParams(temperature=0.3, top_p=0.4), [1, 2]) is None


def test_groups_give_what_each_row_gives_alone():
    cases = [random_case(seed) for seed in range(20)]
    logits_NV = torch.stack([logits_V for logits_V, *_ in cases])
    rows = [
        SampleRow(params, seed, len(prompt) + len(generated), (), penalties(params, prompt, generated))
        for seed, (_, params, prompt, generated) in enumerate(cases)
    ]
    rows[7] = SampleRow(SamplingParams(temperature=0.0), 0, 0)
    kept_NV = logits_NV.clone()
    together = sample(logits_NV, rows)
    assert torch.equal(logits_NV, kept_NV)
    assert together == [sample(logits_NV[n : n + 1], [row])[0] for n, row in enumerate(rows)]
    assert together[7] == int(logits_NV[7].argmax())
    everything_NV = logits_NV.clone()
    apply_penalties(everything_NV, [(n, row.penalties) for n, row in enumerate(rows) if row.penalties is not None])
    for n, (logits_V, params, prompt, generated) in enumerate(cases):
        if n != 7:
            assert torch.equal(everything_NV[n], adjusted(logits_V, params, prompt, generated))


def test_many_tokens_are_counted_right():
    rng = random.Random(0)
    generated = [rng.randrange(VOCABULARY) for _ in range(2000)]
    found = penalties(SamplingParams(presence_penalty=1.0), [], generated)
    counts = dict(zip(found.ids.tolist(), found.counts.tolist(), strict=True))
    assert counts == {token: generated.count(token) for token in set(generated)}
