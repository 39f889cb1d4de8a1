"""Products of few rows with large matrices, at the rate at which all threads of a CPU can read the matrices.

BLAS libraries are made for many rows: with two to eight they read weights at half of the memory's bandwidth or less.
Here each row of a matrix is read once and multiplied with up to four rows while it is in registers (by numba). Several
matrices, each with rows of its own, are one piece of work: whoever is free takes the next few rows of the next matrix,
so that a busy core holds up nobody and threads meet once, not once for each matrix.

Shapes: T rows, D width of a row, N width of a result.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import cfunc, types
from torch import Tensor

from llama4 import openmp
from llama4.intrinsics import CACHE, fetch_add
from llama4.tiles import FLOAT, dots

_PORTION = 48  # rows of a matrix that a thread takes at a time
_HEADER = 4


def few_rows(x_TD: Tensor, weights_ND: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Rows times the transposes of matrices of one shape [T, N]: counts[i] consecutive rows are for weights_ND[i].

    All are float32 on the CPU, the weights contiguous.
    """
    assert all(w_ND.is_contiguous() and w_ND.dtype == torch.float32 for w_ND in weights_ND)
    assert x_TD.dtype == torch.float32 and sum(counts) == x_TD.shape[0]
    width, hidden = weights_ND[0].shape
    x_TD = x_TD.contiguous()
    y_TN = torch.empty((x_TD.shape[0], width))
    x, y = x_TD.data_ptr(), y_TN.data_ptr()
    job = [0, len(counts), width, hidden]
    for first, w_ND, count in zip(itertools.accumulate(counts, initial=0), weights_ND, counts, strict=False):
        job += (x + first * hidden * FLOAT, w_ND.data_ptr(), y + first * width * FLOAT, count)
    openmp.run(_take_portions, np.array(job))
    return y_TN


@cfunc(types.void(types.CPointer(types.int64)), cache=CACHE)
def _take_portions(job: Any) -> None:
    """Runs in every thread. `job`: portions taken; matrices, N, D; for each matrix addresses of x, w, y, and its T."""
    matrices, width, hidden = job[1], job[2], job[3]
    stride = hidden * FLOAT
    per_matrix = (width + _PORTION - 1) // _PORTION
    portion = fetch_add(job, 0, 1)
    while portion < matrices * per_matrix:
        matrix = _HEADER + 4 * (portion // per_matrix)
        first = portion % per_matrix * _PORTION
        columns = min(_PORTION, width - first)
        x, w, y, rows = job[matrix], job[matrix + 1], job[matrix + 2], job[matrix + 3]
        dots(rows, x, stride, columns, w + first * stride, stride, y + first * FLOAT, width * FLOAT, hidden)
        portion = fetch_add(job, 0, 1)
