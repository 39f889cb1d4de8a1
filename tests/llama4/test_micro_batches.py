"""Steps cut in two, and the order in which the halves are computed. Shapes: T rows, N image rows, D width."""

from __future__ import annotations

from collections.abc import Generator
from itertools import accumulate

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llama4.kv_pages import Batch, InputRows, Segment
from llama4.micro_batches import halve, in_turn


@given(st.lists(st.integers(1, 40), min_size=2, max_size=12), st.integers(0, 999))
def test_halves_are_the_batch_and_as_equal_as_can_be(lengths: list[int], seed: int) -> None:
    starts = [0, *accumulate(lengths)]
    rows = starts.pop()
    segments = [Segment(start, n, 7 * start, {"full": [start]}) for start, n in zip(starts, lengths, strict=True)]
    image_N = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[: rows // 2]
    batch = Batch.of(list(range(rows)), segments, InputRows(image_N, image_N[:, None].float()))

    halves = halve(batch)
    first = len(halves[0].token_ids_T)
    assert abs(2 * first - rows) == min(abs(2 * start - rows) for start in starts[1:])
    for half, offset in zip(halves, (0, first), strict=True):
        assert half.images is not None
        assert torch.equal(half.images.rows_N + offset, half.images.inputs_ND[:, 0].long())
        again = Batch.of(half.token_ids_T.tolist(), half.segments)  # its segments cover its rows
        assert torch.equal(again.positions_T, half.positions_T)
    assert torch.cat([half.token_ids_T for half in halves]).tolist() == list(range(rows))
    assert sum(len(half.images.rows_N) for half in halves if half.images) == len(image_N)
    assert [s.pages for half in halves for s in half.segments] == [s.pages for s in segments]


def test_one_flow_computes_while_the_other_waits() -> None:
    done: list[str] = []

    def flow(name: str, layers: int) -> Generator[None, None, Tensor]:
        for layer in range(layers):
            done.append(f"send {name}{layer}")
            yield
            done.append(f"take {name}{layer}")
        return torch.tensor(layers)

    assert [int(found) for found in in_turn([flow("a", 2), flow("b", 2)])] == [2, 2]
    assert done == ["send a0", "send b0", "take a0", "send a1", "take b0", "send b1", "take a1", "take b1"]
