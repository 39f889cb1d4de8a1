from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from llama4.linear import grouped_linear, linear
from llama4.row_products import row_products


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 1500])
@pytest.mark.parametrize(("width", "hidden"), [(1024, 256), (2048, 512), (1500, 256), (999, 333), (16, 64)])
def test_the_product_is_right_for_all_numbers_of_rows(rows: int, width: int, hidden: int) -> None:
    torch.manual_seed(rows)
    x_TD, w_ND = torch.randn(rows, hidden), torch.randn(width, hidden)
    got = linear(x_TD, w_ND)
    assert got.shape == (rows, width) and got.stride(1) == 1
    torch.testing.assert_close(got, F.linear(x_TD, w_ND), rtol=1e-4, atol=1e-4)


def test_other_types_are_left_to_torch() -> None:
    x_TD, w_ND = torch.randn(2, 512).bfloat16(), torch.randn(1024, 512).bfloat16()
    assert torch.equal(linear(x_TD, w_ND), F.linear(x_TD, w_ND))


@given(
    counts=st.lists(st.integers(0, 9) | st.integers(10, 70), min_size=1, max_size=4),
    width=st.integers(1, 150),
    hidden=st.integers(1, 70),
    threads=st.integers(1, 4),
)
def test_row_products_of_any_shape(counts: list[int], width: int, hidden: int, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(width)
    x_TD, weights_ND = torch.randn(hidden, sum(counts)).t(), [torch.randn(width, hidden) for _ in counts]
    want_TN = torch.cat([F.linear(*pair) for pair in zip(x_TD.split(counts), weights_ND, strict=True)])
    got_TN = row_products(x_TD, weights_ND, counts)
    torch.testing.assert_close(got_TN, want_TN, rtol=1e-4, atol=1e-4)
    alone = [
        row_products(x_D[None], (w_ND,), (1,))
        for rows_TD, w_ND in zip(x_TD.split(counts), weights_ND, strict=True)
        for x_D in rows_TD
    ]
    assert torch.equal(got_TN, torch.cat(alone) if alone else got_TN), "bit for bit, whatever else is multiplied"


@pytest.mark.parametrize("counts", [(3, 1, 2), (1, 500, 30)])
@pytest.mark.parametrize(("width", "hidden"), [(1024, 256), (16, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_group_of_rows_has_its_own_matrix(
    counts: tuple[int, ...], width: int, hidden: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x_TD = torch.randn(sum(counts), hidden, dtype=dtype)
    weights_ND = [torch.randn(width, hidden, dtype=dtype) for _ in counts]
    want_TN = torch.cat([F.linear(*pair) for pair in zip(x_TD.split(counts), weights_ND, strict=True)])
    torch.testing.assert_close(grouped_linear(x_TD, weights_ND, counts), want_TN, rtol=1e-4, atol=1e-4)


def test_several_threads_may_multiply_row_products_at_a_time() -> None:
    x_TD, w_ND = torch.randn(3, 256), torch.randn(2048, 256)
    expected = row_products(x_TD, (w_ND,), (3,))
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: row_products(x_TD, (w_ND,), (3,)), range(200)):
            assert torch.equal(got, expected)
