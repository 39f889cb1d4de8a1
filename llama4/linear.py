"""Products with weight matrices, by the fastest way that the device has.

Measured on two cores with AVX2 (torch 2.13, MKL 2024.2), matrix [2048, 1024], in float32: BLAS reads weights at 11 GB/s
with 2 rows and 8 with 4, where `few_rows` reads 28 and 26, and computes 57, 112, 129 and 151 GFLOP/s with 16, 64, 128
and 256 rows, where `few_rows` computes 120, 155, 160 and 160. Square matrices of 2048 are multiplied at 180.

Shapes: T rows, D width of a row, N width of a result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llama4 import openmp
from llama4.few_rows import few_rows

FEW_ROWS = 1024  # above, BLAS is as fast
_SMALL_WEIGHTS = 1 << 18  # below, a second thread costs more than it saves


def linear(x_TD: Tensor, w_ND: Tensor) -> Tensor:
    """x_TD times the transpose of w_ND [T, N]. Rows of the result may have space between them."""
    if _few(x_TD, w_ND, x_TD.shape[0]):
        return few_rows(x_TD, (w_ND,), (x_TD.shape[0],))
    return F.linear(x_TD, w_ND)


def grouped_linear(x_TD: Tensor, weights_ND: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """The same with a matrix for each group of rows [T, N]: counts[i] >= 1 consecutive rows are for weights_ND[i]."""
    if _few(x_TD, weights_ND[0], max(counts)):
        return few_rows(x_TD, weights_ND, counts)
    groups = zip(torch.split(x_TD, list(counts)), weights_ND, strict=True)
    return torch.cat([linear(rows_TD, w_ND) for rows_TD, w_ND in groups])


def _few(x_TD: Tensor, w_ND: Tensor, rows: int) -> bool:
    fits = 0 < rows <= FEW_ROWS and w_ND.numel() >= _SMALL_WEIGHTS
    return fits and x_TD.is_cpu and x_TD.dtype == torch.float32 and openmp.available()
