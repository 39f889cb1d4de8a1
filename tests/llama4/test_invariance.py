"""On a CPU in float32, no bit of an answer depends on what else is in the batch, or on how a prompt was cut."""

from __future__ import annotations

import itertools
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama4 import openmp, plan
from llama4.prefill_attention import BLOCK
from tests.llama4.reference import save_random
from tests.llama4.runner import Runner

pytestmark = pytest.mark.skipif(not openmp.available(), reason="the products are left to BLAS")

CHUNK, VOCABULARY = 32, 64
LONG_CHUNK = BLOCK + 32
LONG_PROMPT = torch.randint(VOCABULARY, (3 * BLOCK + 20,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_random(path, seed=4, vocab_size=VOCABULARY, attention_chunk_size=CHUNK, no_rope_layer_interval=2)
    return path


@given(lengths=st.lists(st.integers(1, CHUNK), min_size=1, max_size=6), seed=st.integers(0, 2**31), data=st.data())
def test_bits_are_those_of_each_token_by_itself(
    checkpoint: Path, lengths: list[int], seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    requests = [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    together = Runner(checkpoint, requests, page_size=4, seed=seed)
    steps: list[list[tuple[int, int]]] = []
    left = list(lengths)
    while any(left):
        wanted = [(number, data.draw(st.integers(0, rest))) for number, rest in enumerate(left) if rest]
        steps.append([(number, rows) for number, rows in wanted if rows] or [(wanted[0][0], 1)])
        for number, rows in steps[-1]:
            left[number] -= rows
    for tokens, got_TV in zip(requests, together.run(steps), strict=True):
        alone = Runner(checkpoint, [tokens], page_size=4, seed=seed)
        (one_by_one_TV,) = alone.run([[(0, 1)]] * len(tokens))
        assert torch.equal(got_TV, one_by_one_TV)


@pytest.fixture(scope="module")
def long_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long")
    save_random(path, seed=5, vocab_size=VOCABULARY, attention_chunk_size=LONG_CHUNK, no_rope_layer_interval=2)
    return path


@pytest.fixture(scope="module")
def one_by_one_TV(long_checkpoint: Path) -> Tensor:
    """Of a long prompt, whose tokens come as if they were decoded."""
    (logits_TV,) = Runner(long_checkpoint, [LONG_PROMPT], page_size=16).run([[(0, 1)]] * len(LONG_PROMPT))
    return logits_TV


@settings(max_examples=25)
@given(
    cuts=st.lists(st.integers(1, len(LONG_PROMPT) - 1), max_size=8, unique=True),
    few_pairs=st.sampled_from([0, 1 << 12, 1 << 16]),
)
@example(cuts=[], few_pairs=0)
@example(cuts=[300], few_pairs=0)
def test_bits_of_a_long_run_are_those_of_each_token_by_itself(
    long_checkpoint: Path, one_by_one_TV: Tensor, cuts: list[int], few_pairs: int
) -> None:
    """Over borders of chunks, pages and blocks: whether rows attend alone or side by side makes no difference."""
    pieces = [stop - start for start, stop in itertools.pairwise([0, *sorted(cuts), len(LONG_PROMPT)])]
    with patch.object(plan, "FEW_PAIRS", few_pairs):
        (got_TV,) = Runner(long_checkpoint, [LONG_PROMPT], page_size=16).run([[(0, piece)] for piece in pieces])
    assert torch.equal(got_TV, one_by_one_TV)
