from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama4 import openmp
from llama4.kv_pages import Window
from llama4.paged_attention import PagedDecode
from llama4.prefill_attention import BLOCK, attend_causally
from tests.llama4.test_paged_attention import LAYER, pages_of

pytestmark = [
    pytest.mark.usefixtures("restored_threads"),
    pytest.mark.skipif(not openmp.available(), reason="torch attends"),
]


def attend(q_THE: Tensor, kv_2KLE: Tensor) -> Tensor:
    out_THE = torch.full(q_THE.shape, torch.nan)
    attend_causally(q_THE, kv_2KLE[0], kv_2KLE[1], out_THE)
    return out_THE


@settings(max_examples=60)
@given(
    rows=st.integers(1, 40) | st.integers(60, 70) | st.integers(120, 140),
    history=st.sampled_from((0, 0, 1, 127, 128, 129)) | st.integers(0, 400),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 4),
    head_dim=st.sampled_from((2, 8, 12, 33, 64, 128)),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_equals_torch(
    rows: int, history: int, kv_heads: int, groups: int, head_dim: int, threads: int, seed: int
) -> None:
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(seed)
    heads = kv_heads * groups
    # Other columns lie between the queries' rows, as keys and values do in the network.
    q_THE = torch.randn(rows, heads + 2, head_dim, generator=generator)[:, :heads]
    kv_2KLE = torch.randn(2, kv_heads, history + rows, head_dim, generator=generator)
    seen_TL = torch.ones(rows, history + rows, dtype=torch.bool).tril(history)
    k_HLE, v_HLE = kv_2KLE.double().repeat_interleave(groups, dim=1)
    expected_HTE = F.scaled_dot_product_attention(q_THE.double().transpose(0, 1), k_HLE, v_HLE, attn_mask=seen_TL)
    torch.testing.assert_close(attend(q_THE, kv_2KLE), expected_HTE.transpose(0, 1).float(), atol=1e-5, rtol=1e-5)


def test_scores_far_apart() -> None:
    """A softmax has no sum to overflow, and a weight that is next to nothing is nothing."""
    q_THE, kv_2KLE = torch.ones(300, 1, 4), torch.randn(2, 1, 300, 4, generator=torch.Generator().manual_seed(1))
    kv_2KLE[0, 0] = torch.linspace(-3000, 3000, 300)[torch.randperm(300)][:, None]
    expected_1TE = F.scaled_dot_product_attention(q_THE.transpose(0, 1), *kv_2KLE, is_causal=True)
    torch.testing.assert_close(attend(q_THE, kv_2KLE), expected_1TE.transpose(0, 1))


@given(cuts=st.lists(st.integers(1, 299), max_size=6, unique=True), seed=st.integers(0, 2**31))
def test_no_bit_depends_on_where_a_prompt_is_cut(cuts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q_THE, kv_2KLE = torch.randn(300, 2, 16, generator=generator), torch.randn(2, 1, 300, 16, generator=generator)
    ends = [*sorted(cuts), 300]
    starts = [0, *ends[:-1]]
    parts = [
        attend(q_THE[start:end], kv_2KLE[:, :, :end].contiguous()) for start, end in zip(starts, ends, strict=True)
    ]
    assert torch.equal(torch.cat(parts), attend(q_THE, kv_2KLE))


@settings(max_examples=60)
@given(
    history=st.integers(0, 3 * BLOCK),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 9),
    head_dim=st.sampled_from((2, 8, 12, 34, 64, 128)),
    page_size=st.sampled_from((1, 3, 16, BLOCK, 300)),
    scale=st.sampled_from((0.1, 1.0, 30.0)),
    seed=st.integers(0, 2**31),
)
def test_a_row_has_the_bits_that_it_has_alone(
    history: int, kv_heads: int, groups: int, head_dim: int, page_size: int, scale: float, seed: int
) -> None:
    rows, first = 37, seed % page_size
    generator = torch.Generator().manual_seed(seed)
    q_THE = scale * torch.randn(rows, kv_heads * groups, head_dim, generator=generator)
    kv_2KLE = torch.randn(2, kv_heads, history + rows, head_dim, generator=generator)
    pages = -(-(first + history + rows) // page_size)
    kv = pages_of(page_size, kv_heads, head_dim, pages)
    kv.pool(LAYER).flatten(0, 1)[first : first + history + rows] = kv_2KLE.permute(2, 0, 1, 3)
    windows = [Window(row, list(range(pages)), first, history + row + 1) for row in range(rows)]
    alone_THE = torch.empty_like(q_THE)
    PagedDecode.of(windows, page_size).attend(LAYER, q_THE, kv, alone_THE)
    assert torch.equal(alone_THE, attend(q_THE, kv_2KLE))
