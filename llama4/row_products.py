"""Products of rows with matrices on CPUs: of few rows at the rate at which all threads can read the matrices.

BLAS libraries are made for many rows: with two to eight they read weights at half of the memory's bandwidth or less,
and the last bits of a row's result depend on the number of rows. Here each row of a matrix is read once and multiplied
with a few rows while it is in registers (by numba): up to four that lie where they are, or sixteen that have been
interleaved; each product is summed in the same order either way. Several matrices, each with rows of its own, are one
piece of work: whoever is free takes the next few rows of the next matrix, so that a busy core holds up nobody and
threads meet once, not once for each matrix.

Shapes: T rows, D width of a row, N width of a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numba import cfunc, types
from torch import Tensor

from llama4 import openmp
from llama4.intrinsics import CACHE, PANEL, fetch_add
from llama4.tiles import FLOAT, dots, interleave, panel_dots

_PORTION = 48  # rows of a matrix that a thread takes at a time
_ROWS = 64  # that are multiplied with all of a matrix before the next ones: interleaved, they stay in the second cache
_HEADER = 5
_PIECE = 5  # numbers of a matrix and rows for it
_SMALL = 1 << 18  # multiplications; below, a second thread costs more than it saves
_ALIASED = 1024  # bytes: lines so far apart crowd into few sets of a cache
_LINE = 64


def row_products(x_TD: Tensor, weights_ND: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Rows times the transposes of matrices of one shape [T, N]: counts[i] consecutive rows are for weights_ND[i].

    All are float32 on the CPU and the weights contiguous; the caller sees to that, and that the counts sum up to T. The
    rows of the result may have space between them.
    """
    (width, hidden), most = weights_ND[0].shape, max(counts)
    x_TD = x_TD.contiguous()
    room = width
    if most >= 2 * PANEL and width * FLOAT % _ALIASED == 0:
        room += _LINE // FLOAT  # 6% faster with 64 rows, 19% with 128
    y_TN = torch.empty((x_TD.shape[0], room))
    threads = 1 if x_TD.shape[0] * width * hidden < _SMALL else None
    panels = _panels(x_TD, counts, threads) if most >= PANEL else None
    x, y, panel = x_TD.data_ptr(), y_TN.data_ptr(), 0 if panels is None else panels.data_ptr()
    pieces: list[int] = []
    for w_ND, count in zip(weights_ND, counts, strict=True):
        for first in range(0, count, _ROWS):
            rows = min(_ROWS, count - first)
            pieces += (x, panel, w_ND.data_ptr(), y, rows)
            x, y = x + rows * hidden * FLOAT, y + rows * room * FLOAT
            panel += rows // PANEL * PANEL * hidden * FLOAT
    openmp.run(_TAKE_PORTIONS, (0, len(pieces) // _PIECE, width, hidden, room * FLOAT, *pieces), threads)
    return y_TN if room == width else y_TN[:, :width]


def _panels(x_TD: Tensor, counts: Sequence[int], threads: int | None) -> Tensor:
    """As many whole panels as there are in each count of rows, as `panel_dots` reads them."""
    hidden = x_TD.shape[1]
    panels = torch.empty((sum(count // PANEL for count in counts), hidden, PANEL))
    job = [0, len(panels), hidden, panels.data_ptr()]
    x = x_TD.data_ptr()
    for count in counts:
        job += (x + panel * PANEL * hidden * FLOAT for panel in range(count // PANEL))
        x += count * hidden * FLOAT
    openmp.run(_TAKE_PANELS, job, threads)
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

    `job`: portions taken; pieces, N, D; bytes from a row of y to the next; for each piece the addresses of x, its
    panels, w and y; its T.
    """
    pieces, width, hidden = job[1], job[2], job[3]
    stride, y_stride = hidden * FLOAT, job[4]
    per_matrix = (width + _PORTION - 1) // _PORTION
    portion = fetch_add(job, 0, 1)
    while portion < pieces * per_matrix:
        piece = _HEADER + _PIECE * (portion // per_matrix)
        first = portion % per_matrix * _PORTION
        columns = min(_PORTION, width - first)
        w, y = job[piece + 2] + first * stride, job[piece + 3] + first * FLOAT
        rows = job[piece + 4]
        done = rows - rows % PANEL
        panel_dots(done, job[piece + 1], columns, w, stride, y, y_stride, hidden)
        x, y = job[piece] + done * stride, y + done * y_stride
        dots(rows - done, x, stride, columns, w, stride, y, y_stride, hidden)
        portion = fetch_add(job, 0, 1)


_TAKE_PANELS: int = _take_panels.address
_TAKE_PORTIONS: int = _take_portions.address
