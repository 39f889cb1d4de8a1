from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from llama4.linear import FEW_ROWS, _parts, linear


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [0, 1, 2, 7, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize(("width", "hidden"), [(1024, 256), (2048, 512), (1500, 256), (999, 333), (16, 64)])
def test_cut_or_whole_the_product_is_the_same(rows: int, width: int, hidden: int) -> None:
    torch.manual_seed(rows)
    x_TD, w_ND = torch.randn(rows, hidden), torch.randn(width, hidden)
    got = linear(x_TD, w_ND)
    assert got.shape == (rows, width) and got.is_contiguous()
    torch.testing.assert_close(got, F.linear(x_TD, w_ND), rtol=1e-4, atol=1e-4)


def test_other_types_are_not_cut() -> None:
    x_TD, w_ND = torch.randn(2, 512).bfloat16(), torch.randn(1024, 512).bfloat16()
    assert torch.equal(linear(x_TD, w_ND), F.linear(x_TD, w_ND))


def test_every_thread_has_a_part_and_parts_fit_the_cache() -> None:
    assert _parts(1, 2048, 1024, threads=2) == 2
    assert _parts(1, 2048, 1024, threads=3) == 4
    assert _parts(4, 2048, 1024, threads=2) == 8
    assert _parts(4, 32000, 1024, threads=2) == 64  # 128 would leave fewer than 256 rows
    assert _parts(4, 2047, 1024, threads=2) == 1  # cannot be cut evenly
    assert _parts(4, 2048, 1024, threads=1) == 1
    assert _parts(1, 16, 1024, threads=2) == 1  # too small
    assert _parts(0, 2048, 1024, threads=2) == 1
