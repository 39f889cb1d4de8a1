"""Sampling: the distribution is right, the filters are, and the result depends on the request alone."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.request import SamplingParams
from engine.sampler import SampleRow, sample, token_logprobs, uniform


def row(position: int = 0, seed: int = 1, forbidden: tuple[int, ...] = (), **params: float) -> SampleRow:
    return SampleRow(SamplingParams(max_tokens=100, **params), seed, position, forbidden)


def test_temperature_zero_is_the_argmax():
    logits_NV = torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    assert sample(logits_NV, [row(n, temperature=0.0) for n in range(5)]) == logits_NV.argmax(-1).tolist()


def test_frequencies_follow_the_softmax():
    logits_V = torch.tensor([0.0, 1.0, 2.0, -1.0])
    draws = 4000
    tokens = sample(logits_V.expand(draws, -1), [row(n, temperature=0.7) for n in range(draws)])
    expected = torch.softmax(logits_V / 0.7, dim=-1)
    found = torch.bincount(torch.tensor(tokens), minlength=4) / draws
    assert torch.allclose(found, expected, atol=0.03)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    top_k=st.integers(0, 5),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 0.5),
    neighbours=st.integers(0, 6),
    place=st.integers(0, 6),
)
def test_a_row_does_not_depend_on_its_batch(seed, top_k, top_p, min_p, neighbours, place):
    generator = torch.Generator().manual_seed(7)
    logits_V = torch.randn(50, generator=generator)
    mine = row(3, seed, temperature=0.9, top_k=top_k, top_p=top_p, min_p=min_p)
    alone = sample(logits_V[None], [mine])[0]
    place = min(place, neighbours)
    others = torch.randn(neighbours, 50, generator=generator)
    rows = [row(n, n, temperature=1.3 * (n % 2), top_k=n % 3) for n in range(neighbours)]
    batch = torch.cat([others[:place], logits_V[None], others[place:]])
    assert sample(batch, [*rows[:place], mine, *rows[place:]])[place] == alone


@settings(max_examples=50, deadline=None)
@given(top_k=st.integers(1, 8), top_p=st.floats(0.01, 1.0), min_p=st.floats(0.0, 1.0), position=st.integers(0, 1000))
def test_filters_keep_only_what_they_should(top_k, top_p, min_p, position):
    logits_V = torch.tensor([3.0, 1.0, 2.0, 0.0, -1.0, 2.5, -3.0, 0.5])
    token = sample(logits_V[None], [row(position, temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)])[0]
    probs = torch.softmax(logits_V.double(), dim=-1)
    order = probs.argsort(descending=True).tolist()
    rank = order.index(token)
    assert rank < top_k
    assert rank == 0 or sum(probs[other].item() for other in order[:rank]) < top_p
    assert rank == 0 or probs[token] >= min_p * probs.max()


def test_forbidden_tokens_never_come():
    logits_V = torch.tensor([9.0, 8.0, 0.0])
    rows = [row(n, temperature=temperature, forbidden=(0, 1)) for n, temperature in enumerate((0.0, 1.0, 5.0))]
    assert sample(logits_V.expand(3, -1), rows) == [2, 2, 2]
    assert logits_V.tolist() == [9.0, 8.0, 0.0]


def test_uniform_is_uniform_and_fixed():
    values = [uniform(5, position) for position in range(2000)]
    assert abs(sum(values) / 2000 - 0.5) < 0.03 and len(set(values)) == 2000
    assert uniform(5, 3) == uniform(5, 3) != uniform(6, 3)
    assert all(0 <= value < 1 for value in values)


def test_logprobs_are_those_of_the_plain_softmax():
    logits_NV = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    expected_NV = logits_NV.log_softmax(-1)
    entries = token_logprobs(logits_NV, [4, 0, 2], [0, 2, 9])
    for n, (entry, token) in enumerate(zip(entries, (4, 0, 2), strict=True)):
        assert entry.token_id == token and abs(entry.logprob - expected_NV[n, token].item()) < 1e-6
    assert [len(entry.top) for entry in entries] == [0, 2, 6]
    assert entries[1].top[0][0] == int(expected_NV[1].argmax())
