from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from llama4.linear import gated_linear, linear
from llama4.row_products import row_products

pytestmark = pytest.mark.usefixtures("two_threads")


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


def _mlp(x_TD: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate_TI, up_TI = F.linear(x_TD, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate_TI) * up_TI, down)


@given(
    counts=st.lists(st.integers(1, 9) | st.integers(10, 150), min_size=1, max_size=4),
    width=st.integers(1, 150),
    hidden=st.integers(1, 70),
    threads=st.integers(1, 4),
)
def test_gated_products_of_any_shape(counts: list[int], width: int, hidden: int, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(width)
    x_TD = torch.randn(hidden, sum(counts)).t()
    gate_ups, downs = [torch.randn(2 * width, hidden) for _ in counts], [torch.randn(hidden, width) for _ in counts]
    groups = list(zip(x_TD.split(counts), gate_ups, downs, strict=True))
    got_TD = gated_linear(x_TD, gate_ups, downs, counts)
    torch.testing.assert_close(got_TD, torch.cat([_mlp(*group) for group in groups]), rtol=1e-4, atol=1e-3)
    alone = [gated_linear(x_D[None], (gate_up,), (down,), (1,)) for x_ND, gate_up, down in groups for x_D in x_ND]
    assert torch.equal(got_TD, torch.cat(alone)), "bit for bit, whatever else is multiplied"


@pytest.mark.parametrize("rows", [1, 16, 100])
@pytest.mark.parametrize("width", [1024, 1040, 2500])
def test_wide_rows_have_the_same_bits_alone(rows: int, width: int) -> None:
    """Beyond a block of sums, and with a rest of one."""
    torch.manual_seed(rows)
    x_TD, gate_up, down = torch.randn(rows, width), torch.randn(60, width), torch.randn(20, 30)
    w_ND = torch.randn(30, width)
    products, outputs = linear(x_TD, w_ND), gated_linear(x_TD, (gate_up,), (down,), (rows,))
    torch.testing.assert_close(products, F.linear(x_TD, w_ND), rtol=1e-4, atol=1e-3)
    for row, x_D in enumerate(x_TD):
        assert torch.equal(products[row], linear(x_D[None], w_ND)[0])
        assert torch.equal(outputs[row], gated_linear(x_D[None], (gate_up,), (down,), (1,))[0])


@pytest.mark.parametrize("gate", [float("nan"), float("inf"), -float("inf"), -1e30, 1e30, -90.0, -0.0, 0.0])
@pytest.mark.parametrize("rows", [1, 16])
def test_a_gate_may_be_anything(gate: float, rows: int) -> None:
    """As torch's silu: what is not a number stays visible."""
    x_TD = torch.full((rows, 1), gate)
    gate_up, down = torch.ones(2, 1), torch.ones(1, 1)
    torch.testing.assert_close(
        gated_linear(x_TD, (gate_up,), (down,), (rows,)), _mlp(x_TD, gate_up, down), equal_nan=True
    )


@pytest.mark.parametrize("counts", [(3, 1, 2), (1, 500, 30)])
@pytest.mark.parametrize(("width", "hidden"), [(1024, 256), (16, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_group_of_rows_has_its_own_mlp(
    counts: tuple[int, ...], width: int, hidden: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x_TD = torch.randn(sum(counts), hidden, dtype=dtype)
    gate_ups = [torch.randn(2 * width, hidden, dtype=dtype) / hidden**0.5 for _ in counts]
    downs = [torch.randn(hidden, width, dtype=dtype) / width**0.5 for _ in counts]
    want_TD = torch.cat([_mlp(*group) for group in zip(x_TD.split(counts), gate_ups, downs, strict=True)])
    torch.testing.assert_close(gated_linear(x_TD, gate_ups, downs, counts), want_TD, rtol=1e-4, atol=1e-4)


def test_several_threads_may_multiply_row_products_at_a_time() -> None:
    x_TD, w_ND = torch.randn(3, 256), torch.randn(2048, 256)
    expected = row_products(x_TD, (w_ND,), (3,))
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: row_products(x_TD, (w_ND,), (3,)), range(200)):
            assert torch.equal(got, expected)
