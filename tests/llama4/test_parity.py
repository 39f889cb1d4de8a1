"""Logits against transformers' Llama 4, over random shapes and random orders of steps."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama4 import gathered_attention, openmp, paged_attention, plan
from llama4.kv_pages import Batch
from tests.llama4.reference import SMALL, reference_logits, save_random
from tests.llama4.runner import Runner

TOLERANCE = 1e-4
VOCABULARY = int(str(SMALL["vocab_size"]))
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
few = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, object]:
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    layers = draw(st.integers(1, 5))
    experts = draw(st.sampled_from([2, 4, 5]))
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": 10000.0}
    if draw(st.booleans()):
        equal = draw(st.booleans())  # as Scout has it
        rope = LLAMA3_ROPE | ({"high_freq_factor": 1.0, "factor": 16.0} if equal else {})
    shape: dict[str, object] = {
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * draw(st.sampled_from([1, 2, 5])),
        "head_dim": draw(st.sampled_from([4, 8, 16])),
        "attention_chunk_size": draw(st.sampled_from([1, 4, 7, 16, 1000])),
        "interleave_moe_layer_step": draw(st.sampled_from([1, 2])),
        "num_local_experts": experts,
        "num_experts_per_tok": draw(st.sampled_from([1, 2])),
        "floor_scale": draw(st.sampled_from([1, 3, 8])),
        "attn_temperature_tuning": draw(st.sampled_from([True, True, False])),
        "rope_parameters": rope,
        "no_rope_layer_interval": draw(st.sampled_from([1, 2, 4])),
        "use_qk_norm": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if draw(st.booleans()):
        shape["moe_layers"] = draw(st.lists(st.integers(0, layers - 1), unique=True))
    if draw(st.booleans()):
        shape["layer_types"] = draw(
            st.lists(st.sampled_from(["full_attention", "chunked_attention"]), min_size=layers, max_size=layers)
        )
        shape["no_rope_layers"] = draw(st.lists(st.sampled_from([0, 1]), min_size=layers, max_size=layers))
    return shape


def prompts(low: int, high: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, VOCABULARY - 1), min_size=low, max_size=high)


def check(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape and got.dtype == torch.float32
    assert (got - want).abs().max() <= TOLERANCE


@few
@given(shapes(), prompts(10, 40), st.sampled_from([1, 3, 4, 16]), st.booleans(), st.data())
def test_one_request_whole_in_pieces_and_token_by_token(
    shape: dict[str, object], prompt: list[int], page_size: int, conditional: bool, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as path:
        save_random(path, seed=len(prompt), conditional=conditional, **shape)
        want = reference_logits(path, prompt)
        cuts = data.draw(st.lists(st.integers(1, len(prompt) - 1), unique=True, max_size=5).map(sorted))
        pieces = [b - a for a, b in zip([0, *cuts], [*cuts, len(prompt)], strict=True)]
        for lengths in ([len(prompt)], pieces, [1] * len(prompt)):
            (got,) = Runner(path, [prompt], page_size=page_size).run([[(0, n)] for n in lengths])
            check(got, want)


@few
@given(shapes(), st.integers(2, 5), st.sampled_from([1, 3, 16]), st.booleans(), st.integers(0, 999))
def test_ragged_batches(shape: dict[str, object], count: int, page_size: int, drop: bool, seed: int) -> None:
    """Requests that prefill in pieces, decode, start late and end early, all in one batch."""
    rng = random.Random(seed)
    requests = [[rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 30))] for _ in range(count)]
    left = [len(request) for request in requests]
    steps = []
    while any(left):
        work = []
        for request in rng.sample(range(count), count):
            n = min(left[request], rng.choice([0, 1, 1, 2, 9]))
            if n:
                work.append((request, n))
                left[request] -= n
        if work:
            steps.append(work)
    with tempfile.TemporaryDirectory() as path:
        save_random(path, seed=seed, **shape)
        runner = Runner(path, requests, page_size=page_size, drop_old_pages=drop)
        for got, request in zip(runner.run(steps), requests, strict=True):
            check(got, reference_logits(path, request))


@pytest.mark.parametrize("paged", [True, False])
def test_small_blocks_and_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paged: bool) -> None:
    """With limits so small that masks are cut into blocks and decoding rows into many groups, or many blocks.

    All prompts count as long ones.
    """
    monkeypatch.setattr(plan, "FEW_PAIRS", 0)
    monkeypatch.setattr(plan, "MASK_ELEMENTS", 64)
    monkeypatch.setattr(plan, "MIN_QUERY_BLOCK", 3)
    monkeypatch.setattr(gathered_attention, "SMALL_GROUP_PAGES", 1)
    monkeypatch.setattr(paged_attention, "BLOCK", 4)
    if not paged:
        monkeypatch.setattr(openmp, "suits", lambda dtype, device: False)
    config = save_random(tmp_path, seed=5, attention_chunk_size=19, no_rope_layer_interval=2)
    monkeypatch.setattr(
        gathered_attention, "GATHER_BYTES", 2 * config.num_key_value_heads * config.head_dim * 4 * 2 * 9
    )
    requests = [[(7 * i + 3 * n) % VOCABULARY for i in range(n)] for n in (45, 9, 30, 3, 44)]
    steps = [[(r, len(request) // 3) for r, request in enumerate(requests)]]
    steps += [[(r, len(request) - len(request) // 3 - 2) for r, request in enumerate(requests) if len(request) > 3]]
    steps += [[(r, 1) for r in range(5)], [(r, 1) for r in range(5)]]
    runner = Runner(tmp_path, requests, page_size=2)
    for got, request in zip(runner.run(steps), requests, strict=True):
        check(got, reference_logits(tmp_path, request))


def test_null_chunk_size_attends_to_everything(tmp_path: Path) -> None:
    config = save_random(tmp_path, seed=3, attention_chunk_size=None)
    assert set(config.layer_kinds) == {"full"}
    prompt = list(range(40))
    (got,) = Runner(tmp_path, [prompt], page_size=4).run([[(0, 25)], [(0, 15)]])
    check(got, reference_logits(tmp_path, prompt))


def test_bfloat16_is_near(tmp_path: Path) -> None:
    """The same weights in bfloat16 (slow on most CPUs, but right): within its 8 bits of the float32 logits."""
    config = save_random(tmp_path, seed=4, num_hidden_layers=2, num_experts_per_tok=4, no_rope_layer_interval=2)
    prompt = list(range(20))
    runner = Runner(tmp_path, [prompt], page_size=4, dtype=torch.bfloat16)
    (got,) = runner.run([[(0, 10)], [(0, 8)], [(0, 1)], [(0, 1)]])
    want = reference_logits(tmp_path, prompt)
    assert got.dtype == torch.float32 and got.shape == (20, config.vocab_size)
    assert (got - want).abs().mean() < 0.03 * want.std()


@pytest.mark.parametrize(
    "change",
    [
        {"attention_chunk_size": 1000},
        {"floor_scale": 1000},
        {"attn_temperature_tuning": False},
        {"use_qk_norm": False},
        {"num_experts_per_tok": 2},
        {"no_rope_layer_interval": 4},
        {"rope_parameters": LLAMA3_ROPE},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_oracle_notices(change: dict[str, object], tmp_path: Path) -> None:
    """Each of these details moves the logits by far more than the tolerance, so that parity holds it."""
    base: dict[str, object] = {"no_rope_layer_interval": 2, "rope_parameters": {**LLAMA3_ROPE, "rope_type": "default"}}
    prompt = list(range(40))
    save_random(tmp_path / "a", seed=1, **base)
    save_random(tmp_path / "b", seed=1, **{**base, **change})
    moved = reference_logits(tmp_path / "a", prompt) - reference_logits(tmp_path / "b", prompt)
    assert moved.abs().max() > 100 * TOLERANCE


def test_without_tokens_the_dispatcher_is_still_called(tmp_path: Path) -> None:
    config = save_random(tmp_path, seed=1, interleave_moe_layer_step=2, no_rope_layer_interval=2)
    for scores in ("sigmoid", "softmax"):
        runner = Runner(tmp_path, [[1]], page_size=4, router_scores=scores)
        hidden = runner.decoder(Batch.of([], []), runner.kv, runner.dispatcher)
        assert hidden.shape == (0, config.hidden_size)
        assert runner.decoder.logits(hidden).shape == (0, config.vocab_size)
        assert runner.dispatcher.calls == [(1, 0), (3, 0)]
