"""Products with weight matrices, by the way that suits the device.

On CPUs in float32 that is `row_products`, for any number of rows: then a row's result is the same, bit for bit,
whatever else is in the batch. Measured on two cores (Xeon with AVX-512; torch 2.13), matrices [4096, 1024] that are in
no cache: with 1, 2 and 4 rows BLAS reads weights at 28, 28 and 15 GB/s (on an EPYC at 17, 8 and 8), `row_products` at
28, 29 and 26; with 16, 64, 256, 1024 and 2048 rows BLAS computes 96, 215, 294, 351 and 333 GFLOP/s, `row_products` 122,
265, 275, 284 and 248.

Shapes: T rows, D width of a row, N width of a result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llama4 import openmp
from llama4.row_products import row_products


def linear(x_TD: Tensor, w_ND: Tensor) -> Tensor:
    """x_TD times the transpose of w_ND [T, N]. Rows of the result may have space between them."""
    if openmp.computes(x_TD):
        return row_products(x_TD, (w_ND,), (x_TD.shape[0],))
    return F.linear(x_TD, w_ND)


def grouped_linear(x_TD: Tensor, weights_ND: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """The same with a matrix for each group of rows [T, N]: counts[i] >= 1 consecutive rows are for weights_ND[i]."""
    if openmp.computes(x_TD):
        return row_products(x_TD, weights_ND, counts)
    groups = zip(torch.split(x_TD, list(counts)), weights_ND, strict=True)
    return torch.cat([F.linear(rows_TD, w_ND) for rows_TD, w_ND in groups])
