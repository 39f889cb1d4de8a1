"""Sampling: the distribution is right, the filters are, and the result depends on the request alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
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


@pytest.mark.parametrize("scale", [0.05, 1.0, 6.0])
@pytest.mark.parametrize(
    "params",
    [{"top_p": 0.9}, {"top_p": 0.3, "min_p": 0.01}, {"top_k": 400}, {"top_k": 20}, {"min_p": 0.02}, {"min_p": 1e-9}],
)
def test_filters_on_a_large_vocabulary(scale, params):
    """Flat distributions, which the most likely tokens alone do not decide, as well as steep ones."""
    vocabulary, draws = 2000, 600
    logits_V = torch.randn(vocabulary, generator=torch.Generator().manual_seed(4)) * scale
    probs_V, order_V = torch.softmax(logits_V.double(), dim=-1).sort(descending=True)
    kept_V = torch.arange(vocabulary) < params.get("top_k", vocabulary)
    kept_V &= probs_V.cumsum(-1) - probs_V < params.get("top_p", 1.0)
    kept_V &= probs_V >= params.get("min_p", 0.0) * probs_V[0]
    tokens = sample(logits_V.expand(draws, -1), [row(n, temperature=1.0, **params) for n in range(draws)])
    places_V = order_V.argsort()
    places = [int(places_V[token]) for token in tokens]
    assert all(kept_V[place] for place in places)
    cdf_V = (probs_V * kept_V).cumsum(-1)
    levels = (cdf_V[places] - probs_V[places] / 2) / cdf_V[-1]
    # Where in the distribution the tokens lie: a uniform number's mean, but for what its most likely tokens span.
    assert abs(levels.mean() - 0.5) < 0.05
    spread = (levels - 0.5).square().mean()
    assert abs(spread - (1 - ((probs_V * kept_V / cdf_V[-1]) ** 3).sum()) / 12) < 0.012


def test_temperatures_next_to_zero_and_banned_tokens_are_safe():
    logits_NV = torch.tensor([[1.0, 300.0, float("-inf"), 299.0]]).expand(3, -1)
    rows = [row(n, temperature=temperature) for n, temperature in enumerate((1e-300, 1e-30, 1e-4))]
    assert sample(logits_NV, rows) == [1, 1, 1]


def mask(*allowed: int, vocabulary: int = 40) -> torch.Tensor:
    words = [0] * -(-vocabulary // 32)
    for token in allowed:
        words[token // 32] |= 1 << token % 32
    return torch.tensor([word - 2**32 if word >= 2**31 else word for word in words], dtype=torch.int32)


def test_masks_hold_for_their_rows_only():
    logits_NV = torch.arange(40.0).expand(4, -1)
    free, greedy, drawn, narrow = row(0), row(1, temperature=0.0), row(2, temperature=5.0), row(3, forbidden=(31, 39))
    rows = [
        replace(free, params=SamplingParams(temperature=0.0)),
        replace(greedy, mask_W=mask(3, 31, 33)),
        replace(drawn, mask_W=mask(7)),
        replace(narrow, mask_W=mask(31, 2)),
    ]
    assert sample(logits_NV, rows) == [39, 33, 7, 2]
    # Forbidden until min_tokens, but nothing else would fit the grammar.
    assert sample(logits_NV[:1], [replace(narrow, mask_W=mask(31))]) == [31]


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
