"""Products with weight matrices, by the way that suits the device.

On CPUs in float32 that is `row_products`, for any number of rows: then a row's result is the same, bit for bit,
whatever else is in the batch. Measured on two cores (Xeon with AVX-512; torch 2.13), matrices [4096, 1024] that are in
no cache: with 1, 2 and 4 rows BLAS reads weights at 28, 28 and 15 GB/s (on an EPYC at 17, 8 and 8), `row_products` at
28, 29 and 26; with 16, 64, 256 and 1024 rows `row_products` computes 1.4, 1.1, 0.9 and 0.9 times as fast as BLAS.

Shapes: T rows, D width of a row, N width of a result, I an MLP's inner width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llama4 import openmp
from llama4.gated_products import gated_products
from llama4.row_products import row_products


def linear(x_TD: Tensor, w_ND: Tensor) -> Tensor:
    """x_TD times the transpose of w_ND [T, N]. Rows of the result may have space between them."""
    if openmp.computes(x_TD):
        return row_products(x_TD, (w_ND,), (x_TD.shape[0],))
    return F.linear(x_TD, w_ND)


def gated_linear(x_TD: Tensor, gate_ups: Sequence[Tensor], downs: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """down(silu(gate(x)) * up(x)), each product `linear` [T, D]; gate and up are one matrix [2I, D], down is [D, I].

    counts[i] >= 1 consecutive rows are for the matrices i.
    """
    if openmp.computes(x_TD):
        return gated_products(x_TD, gate_ups, downs, counts)
    groups = zip(torch.split(x_TD, list(counts)), gate_ups, downs, strict=True)
    outputs = [_gated(*group) for group in groups]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _gated(x_TD: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate_TI, up_TI = F.linear(x_TD, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate_TI).mul_(up_TI), down)
