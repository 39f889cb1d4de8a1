"""Products of rows with matrices on CPUs: of few rows at the rate at which all threads can read the matrices.

BLAS libraries are made for many rows: with two to eight they read weights at half of the memory's bandwidth or less,
and the last bits of a row's result depend on the number of rows. Here each row of a matrix is read once and multiplied
with a few rows while it is in registers (by numba): up to four that lie where they are, or sixteen that have been
interleaved; each product is summed in the same order either way. Several matrices, each with rows of its own, are one
piece of work, of which threads take some rows of a matrix at a time: a busy core holds up nobody, and threads meet
once, not once for each matrix.

Shapes: T rows, D width of a row, N width of a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from numba import cfunc, types
from torch import Tensor

from llama4 import openmp
from llama4.intrinsics import CACHE, PANEL, fetch_add
from llama4.portions import after_shares, begin, shares, take
from llama4.tiles import FLOAT, LINE, dots, interleave, panel_dots

_PORTION = 48  # rows of a matrix that a thread takes at a time
ROWS = 64  # that are multiplied with all of a matrix before the next ones: interleaved, they stay in the second cache
_HEADER = 3
_PIECE = 5  # numbers of rows and a matrix for them
_SMALL = 1 << 18  # multiplications; below, a second thread costs more than it saves
_ALIASED = 1024  # bytes: lines so far apart crowd into few sets of a cache

# Up to ROWS rows for one matrix: the addresses of the rows, their panels and the matrix; the first row; how many.
Piece: TypeAlias = tuple[int, int, int, int, int]


def row_products(x_TD: Tensor, weights_ND: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Rows times the transposes of matrices of one shape [T, N]: counts[i] consecutive rows are for weights_ND[i].

    All are float32 on the CPU and the weights contiguous; the caller sees to that, and that the counts sum up to T. The
    rows of the result may have space between them.
    """
    x_TD = x_TD.contiguous()
    panels = interleaved(x_TD, counts)  # kept here: pieces are addresses only
    return products_of(pieces_of(x_TD, panels, weights_ND, counts), len(x_TD), weights_ND[0].shape)


def threads_for(multiplications: int) -> int:
    """How many threads are worth it."""
    return 1 if multiplications < _SMALL else torch.get_num_threads()


def interleaved(x_TD: Tensor, counts: Sequence[int]) -> Tensor | None:
    """As many whole panels as there are in each count of rows, if any, as `panel_dots` reads them [panels, D, 16]."""
    if max(counts) < PANEL:
        return None
    hidden = x_TD.shape[1]
    panels = torch.empty((sum(count // PANEL for count in counts), hidden, PANEL))
    job = [0, len(panels), hidden, panels.data_ptr()]
    x = x_TD.data_ptr()
    for count in counts:
        job += (x + panel * PANEL * hidden * FLOAT for panel in range(count // PANEL))
        x += count * hidden * FLOAT
    openmp.run(_TAKE_PANELS, job, threads_for(x_TD.numel() * PANEL))
    return panels


def pieces_of(x_TD: Tensor, panels: Tensor | None, weights_ND: Sequence[Tensor], counts: Sequence[int]) -> list[Piece]:
    """The work for rows and their panels, as `interleaved` gives them; x_TD need only have rows that are in none."""
    x, panel, size = x_TD.data_ptr(), 0 if panels is None else panels.data_ptr(), x_TD.shape[1] * FLOAT
    pieces, first = [], 0
    for w_ND, count in zip(weights_ND, counts, strict=True):
        w = w_ND.data_ptr()
        for done in range(0, count, ROWS):
            rows = min(ROWS, count - done)
            pieces.append((x + first * size, panel, w, first, rows))
            first += rows
            panel += rows // PANEL * PANEL * size
    return pieces


def products_of(pieces: Sequence[Piece], rows: int, shape: Sequence[int]) -> Tensor:
    """The products of all pieces [T, N]: so many rows, and matrices of this shape [N, D]."""
    width, hidden = shape
    room = width
    if width * FLOAT % _ALIASED == 0 and any(piece[-1] >= 2 * PANEL for piece in pieces):
        room += LINE // FLOAT  # 6% faster with 64 rows, 19% with 128
    y_TN = torch.empty((rows, room))
    y, step = y_TN.data_ptr(), room * FLOAT
    threads = threads_for(rows * width * hidden)
    job = shares(len(pieces) * -(-width // _PORTION), threads)
    job += (width, hidden, step)
    for x, panel, w, first, some in pieces:
        job += (x, panel, w, y + first * step, some)
    openmp.run(_TAKE_PORTIONS, job, threads)
    return y_TN if room == width else y_TN[:, :width]


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

    `job`: the shares; N, D; bytes from a row of y to the next; for each piece the addresses of x, its panels, w
    and y; its T.
    """
    header = after_shares(job)
    width, hidden, y_stride = job[header], job[header + 1], job[header + 2]
    stride = hidden * FLOAT
    per_matrix = (width + _PORTION - 1) // _PORTION
    for portion in take(job, begin(job)):
        piece = header + _HEADER + _PIECE * (portion // per_matrix)
        first = portion % per_matrix * _PORTION
        columns = min(_PORTION, width - first)
        w, y = job[piece + 2] + first * stride, job[piece + 3] + first * FLOAT
        rows = job[piece + 4]
        done = rows - rows % PANEL
        panel_dots(0, done, job[piece + 1], columns, w, stride, y, y_stride, hidden)
        x, y = job[piece] + done * stride, y + done * y_stride
        dots(rows - done, x, stride, columns, w, stride, y, y_stride, hidden)


_TAKE_PANELS: int = _take_panels.address
_TAKE_PORTIONS: int = _take_portions.address
