"""Products of few rows with large matrices, at the rate at which all threads of a CPU can read the matrices.

BLAS libraries are made for many rows: with two to eight they read weights at half of the memory's bandwidth or less.
Here each row of a matrix is read once and multiplied with a few rows while it is in registers (by numba): four that lie
where they are, or sixteen that have been interleaved. Several matrices, each with rows of its own, are one piece of
work: whoever is free takes the next few rows of the next matrix, so that a busy core holds up nobody and threads meet
once, not once for each matrix.

Shapes: T rows, D width of a row, N width of a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import cfunc, types
from torch import Tensor

from llama4 import openmp
from llama4.intrinsics import CACHE, PANEL, fetch_add
from llama4.tiles import FLOAT, dots, interleave, panel_dots

_PORTION = 48  # rows of a matrix that a thread takes at a time
_HEADER = 5
_MATRIX = 5  # numbers of a matrix
_ALIASED = 4096  # bytes: lines so far apart take each other's place in a cache
_LINE = 64


def few_rows(x_TD: Tensor, weights_ND: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Rows times the transposes of matrices of one shape [T, N]: counts[i] consecutive rows are for weights_ND[i].

    All are float32 on the CPU, the weights contiguous. The rows of the result may have space between them.
    """
    assert all(w_ND.is_contiguous() and w_ND.dtype == torch.float32 for w_ND in weights_ND)
    assert x_TD.dtype == torch.float32 and sum(counts) == x_TD.shape[0]
    width, hidden = weights_ND[0].shape
    x_TD = x_TD.contiguous()
    room = width
    if max(counts) >= 2 * PANEL and width * FLOAT % _ALIASED == 0:
        room += _LINE // FLOAT  # 6% faster with 64 rows, 19% with 128
    y_TN = torch.empty((x_TD.shape[0], room))[:, :width]
    panels = _panels(x_TD, counts)
    x, y, panel = x_TD.data_ptr(), y_TN.data_ptr(), panels.data_ptr()
    job = [0, len(counts), width, hidden, room * FLOAT]
    for w_ND, count in zip(weights_ND, counts, strict=True):
        job += (x, panel, w_ND.data_ptr(), y, count)
        x, y = x + count * hidden * FLOAT, y + count * room * FLOAT
        panel += count // PANEL * PANEL * hidden * FLOAT
    openmp.run(_take_portions, np.array(job))
    return y_TN


def _panels(x_TD: Tensor, counts: Sequence[int]) -> Tensor:
    """As many whole panels as there are in each count of rows, as `panel_dots` reads them."""
    hidden = x_TD.shape[1]
    panels = torch.empty((sum(count // PANEL for count in counts), hidden, PANEL))
    if len(panels):
        job = [0, len(panels), hidden, panels.data_ptr()]
        x = x_TD.data_ptr()
        for count in counts:
            job += (x + panel * PANEL * hidden * FLOAT for panel in range(count // PANEL))
            x += count * hidden * FLOAT
        openmp.run(_take_panels, np.array(job))
    return panels


@cfunc(types.void(types.CPointer(types.int64)), cache=CACHE)
def _take_panels(job: Any) -> None:
    """Runs in every thread. `job`: panels taken; panels, D, their address; for each the address of its rows."""
    hidden = job[2]
    panel = fetch_add(job, 0, 1)
    while panel < job[1]:
        interleave(job[4 + panel], hidden * FLOAT, hidden, job[3] + panel * hidden * PANEL * FLOAT)
        panel = fetch_add(job, 0, 1)


@cfunc(types.void(types.CPointer(types.int64)), cache=CACHE)
def _take_portions(job: Any) -> None:
    """Runs in every thread.

    `job`: portions taken; matrices, N, D; bytes from a row of y to the next; for each matrix addresses of x, its
    panels, w and y; its T.
    """
    matrices, width, hidden = job[1], job[2], job[3]
    stride, y_stride = hidden * FLOAT, job[4]
    per_matrix = (width + _PORTION - 1) // _PORTION
    portion = fetch_add(job, 0, 1)
    while portion < matrices * per_matrix:
        matrix = _HEADER + _MATRIX * (portion // per_matrix)
        first = portion % per_matrix * _PORTION
        columns = min(_PORTION, width - first)
        w, y = job[matrix + 2] + first * stride, job[matrix + 3] + first * FLOAT
        rows = job[matrix + 4]
        done = rows - rows % PANEL
        panel_dots(done, job[matrix + 1], columns, w, stride, y, y_stride, hidden)
        x, y = job[matrix] + done * stride, y + done * y_stride
        dots(rows - done, x, stride, columns, w, stride, y, y_stride, hidden)
        portion = fetch_add(job, 0, 1)
