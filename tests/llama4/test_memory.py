from __future__ import annotations

import pytest
import torch

from llama4.memory import HUGE_PAGE, zeros


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 4096, 4099])
def test_zeros_of_any_size(dtype: torch.dtype, rows: int) -> None:
    x = zeros((rows, 3, 100), dtype, "cpu")
    assert x.shape == (rows, 3, 100) and x.dtype == dtype and x.is_contiguous() and not x.any()
    x += 1
    y = zeros((rows, 3, 100), dtype, "cpu")
    assert (x == 1).all() and not y.any(), "each has memory of its own"


def test_large_tensors_start_at_a_huge_page() -> None:
    assert zeros((HUGE_PAGE,), torch.float32, "cpu").data_ptr() % HUGE_PAGE == 0
