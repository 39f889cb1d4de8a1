"""On a CPU in float32, no bit of an answer depends on what else is in the batch, or on how a prompt was cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama4 import openmp, plan
from tests.llama4.reference import save_random
from tests.llama4.runner import Runner

pytestmark = pytest.mark.skipif(not openmp.available(), reason="the products are left to BLAS")

CHUNK, VOCABULARY = 32, 64


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


@pytest.mark.parametrize("pieces", [(2, 68, 5), (31, 2, 31, 2, 9), (10,) * 7 + (5,)])
def test_bits_of_a_long_prompt_are_the_same_wherever_it_is_cut(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, pieces: tuple[int, ...]
) -> None:
    """No piece is a single token: those attend as rows that decode do, in another order."""
    monkeypatch.setattr(plan, "FEW_PAIRS", 0)
    prompt = torch.randint(VOCABULARY, (75,), generator=torch.Generator().manual_seed(len(pieces))).tolist()
    (whole_TV,) = Runner(checkpoint, [prompt], page_size=4).run([[(0, 75)]])
    (cut_TV,) = Runner(checkpoint, [prompt], page_size=4).run([[(0, piece)] for piece in pieces])
    assert torch.equal(whole_TV, cut_TV)
