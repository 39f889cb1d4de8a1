from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama4.config import TextConfig
from llama4.kv_pages import KVPages, Window
from llama4.paged_attention import PagedDecode
from llama4.prefill_attention import BLOCK
from tests.llama4.reference import SMALL

LAYER = 0


pytestmark = pytest.mark.usefixtures("restored_threads")


def pages_of(page_size: int, kv_heads: int, head_dim: int, pages: int) -> KVPages:
    shape = {"num_key_value_heads": kv_heads, "num_attention_heads": kv_heads, "head_dim": head_dim}
    config = TextConfig.from_dict({**SMALL, **shape, "num_hidden_layers": 1})
    kv = KVPages(config, page_size, dict.fromkeys(("full", "chunked"), pages), torch.float32, "cpu")
    kv.pool(LAYER).normal_()
    return kv


def windows_of(page_size: int, places: Sequence[tuple[int, int]], seed: int) -> tuple[list[Window], int]:
    """Windows of (first place, keys) over shuffled pages, each for a row of its own of every second; and the pages."""
    counts = [-(-(first + keys) // page_size) for first, keys in places]
    ids = random.Random(seed).sample(range(sum(counts)), sum(counts))
    rows = random.Random(seed).sample(range(0, 2 * len(places), 2), len(places))
    windows = [
        Window(row, [ids.pop() for _ in range(count)], first, keys)
        for row, count, (first, keys) in zip(rows, counts, places, strict=True)
    ]
    return windows, sum(counts)


def attention(q_HE: Tensor, window: Window, kv: KVPages) -> Tensor:
    kv_L2KE = kv.pool(LAYER)[window.pages].flatten(0, 1)[window.first : window.first + window.keys]
    k_KLE, v_KLE = kv_L2KE.double().permute(1, 2, 0, 3)
    q_KGE = q_HE.double().view(k_KLE.shape[0], -1, q_HE.shape[-1])
    return F.scaled_dot_product_attention(q_KGE, k_KLE, v_KLE).flatten(0, 1).float()


@st.composite
def places(draw: st.DrawFn, page_size: int) -> list[tuple[int, int]]:
    keys = st.integers(1, 40) | st.integers(BLOCK - 2, BLOCK + 2) | st.integers(3 * BLOCK, 3 * BLOCK + 40)
    return draw(st.lists(st.tuples(st.integers(0, page_size - 1), keys), min_size=1, max_size=5))


@settings(deadline=None)
@given(
    data=st.data(),
    page_size=st.sampled_from([1, 3, 16, BLOCK, 300]),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 8),
    head_dim=st.sampled_from([8, 20, 64, 128]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    threads=st.integers(1, 3),
)
def test_rows_attend_to_their_windows(
    data: st.DataObject, page_size: int, kv_heads: int, groups: int, head_dim: int, scale: float, threads: int
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(groups)
    windows, pages = windows_of(page_size, data.draw(places(page_size)), seed=groups)
    kv = pages_of(page_size, kv_heads, head_dim, pages)
    heads = kv_heads * groups
    rows = 2 * len(windows)
    q_THE = scale * torch.randn(rows, heads + 2 * kv_heads, head_dim)[:, :heads]  # as a part of fused projections
    out_THE = torch.full((rows, heads, head_dim), 7.0)
    PagedDecode.of(windows, page_size).attend(LAYER, q_THE, kv, out_THE)
    tolerance = 1e-5 * max(1.0, scale)  # the rounding of scores grows with them
    for window in windows:
        want_HE = attention(q_THE[window.row], window, kv)
        torch.testing.assert_close(out_THE[window.row], want_HE, rtol=0, atol=tolerance)
    assert (out_THE[1::2] == 7.0).all(), "other rows are left alone"


def test_the_result_does_not_depend_on_threads_or_on_the_rest_of_the_batch() -> None:
    torch.manual_seed(0)
    windows, pages = windows_of(16, [(5, 2000), (0, 3), (9, 700)], seed=1)
    kv, q_THE = pages_of(16, 2, 64, pages), torch.randn(6, 8, 64)
    found = []
    for threads, chosen in ((1, windows), (2, windows), (3, windows[::-1]), (2, windows[:1])):
        torch.set_num_threads(threads)
        out_THE = torch.zeros(6, 8, 64)
        PagedDecode.of(chosen, 16).attend(LAYER, q_THE, kv, out_THE)
        found.append(out_THE[windows[0].row])
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_no_row_at_all() -> None:
    kv = pages_of(16, 2, 8, 1)
    PagedDecode.of([], 16).attend(LAYER, torch.randn(3, 2, 8), kv, torch.empty(3, 2, 8))
