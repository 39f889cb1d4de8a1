"""Products of rows with matrices on CPUs: of few rows at the rate at which all threads can read the matrices.

BLAS libraries are made for many rows: with two to eight they read weights at half of the memory's bandwidth or less,
and the last bits of a row's result depend on the number of rows. Here each row of a matrix is read once and multiplied
with a few rows while it is in registers (by numba): up to four that lie where they are, or sixteen that have been
interleaved; each product is summed in the same order either way. Several matrices, each with rows of its own, are one
piece of work, of which threads take some rows of a matrix at a time: a busy core holds up nobody, and threads meet
once, not once for each matrix. The work is laid out in compiled code too: reading weights empties the caches of
everything else, and Python that comes between takes four times as long as in a loop.

Shapes: T rows, D width of a row, N width of a result.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import cfunc, njit, types
from torch import Tensor

from llama4 import openmp
from llama4.intrinsics import CACHE, PANEL, fetch_add, ints_at, run_job
from llama4.portions import after_shares, begin, room_for_shares, share_out, take
from llama4.tiles import FLOAT, INT, LINE, dots, interleave, panel_dots

PORTION = 48  # rows of a matrix that a thread takes at a time
ROWS = 64  # that are multiplied with all of a matrix before the next ones: interleaved, they stay in the second cache
_SMALL = 1 << 18  # multiplications; below, a second thread costs more than it saves
_ALIASED = 1024  # bytes: lines so far apart crowd into few sets of a cache
HEADER = 3  # numbers of a job that each kind of product has for itself
PIECE = 6


def row_products(x_TD: Tensor, weights_ND: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Rows times the transposes of matrices of one shape [T, N]: counts[i] consecutive rows are for weights_ND[i].

    All are float32 on the CPU and the weights contiguous; the caller sees to that, and that the counts sum up to T. The
    rows of the result may have space between them.
    """
    x_TD = x_TD.contiguous()
    rows, hidden = x_TD.shape
    width = weights_ND[0].shape[0]
    y_TN = room_for(rows, width, counts)
    in_panels = rows_in_panels(counts)
    panels = torch.empty(in_panels * hidden)
    numbers = array("q", [*counts, *[w_ND.data_ptr() for w_ND in weights_ND]])
    _multiply(
        openmp.address(), TAKE_PANELS, TAKE_PORTIONS, torch.get_num_threads(), in_panels, len(counts),
        numbers.buffer_info()[0], x_TD.data_ptr(), panels.data_ptr(), hidden, width, y_TN.data_ptr(),
        y_TN.stride(0) * FLOAT,
    )  # fmt: skip
    return y_TN


def rows_in_panels(counts: Sequence[int]) -> int:
    """How many rows are in whole panels, of which there are as many as possible for each matrix."""
    return 0 if max(counts) < PANEL else sum(count - count % PANEL for count in counts)


def room_for(rows: int, width: int, counts: Sequence[int]) -> Tensor:
    """Room for results [T, N]; their rows may have space between them."""
    if width * FLOAT % _ALIASED == 0 and max(counts) >= 2 * PANEL:
        return torch.empty((rows, width + LINE // FLOAT))[:, :width]  # 6% faster with 64 rows, 19% with 128
    return torch.empty((rows, width))


@njit(cache=CACHE)
def threads_for(multiplications: Any, portions: Any, most: Any) -> Any:
    """How many threads are worth it. One that finds nothing to do costs the others the wait for its waking."""
    return 1 if multiplications < _SMALL else min(portions, most)


@njit(cache=CACHE)
def interleave_rows(
    parallel: Any,
    take_panels: Any,
    most: Any,
    x: Any,
    panels: Any,
    in_panels: Any,
    counts: Any,
    matrices: Any,
    hidden: Any,
) -> None:
    """Fills the panels with the rows that go into whole ones, as `panel_dots` reads them [panels, D, 16]."""
    if not in_panels:
        return
    job = np.empty(4 + in_panels // PANEL, np.int64)
    job[0], job[1], job[2], job[3] = 0, in_panels // PANEL, hidden, panels
    at = 4
    for matrix in range(matrices):
        for panel in range(counts[matrix] // PANEL):
            job[at] = x + panel * PANEL * hidden * FLOAT
            at += 1
        x += counts[matrix] * hidden * FLOAT
    run_job(parallel, take_panels, job, threads_for(in_panels * PANEL * hidden, in_panels // PANEL, most))


@njit(cache=CACHE)
def products(
    parallel: Any, function: Any, most: Any, x: Any, panels: Any, counts: Any, weights: Any, matrices: Any,
    hidden: Any, width: Any, y: Any, y_stride: Any, y_panels: Any, last: Any,
) -> None:  # fmt: skip
    """Runs `function` over the portions of all matrices [N, D] and their rows, at most ROWS at a time.

    Its job: the shares; N, D, `last`; for each piece the addresses of x, its panels, the matrix, y and its panels [N,
    16]; its T. `weights`: the matrices' addresses.
    """
    rows = pieces = 0
    for matrix in range(matrices):
        rows += counts[matrix]
        pieces += (counts[matrix] + ROWS - 1) // ROWS
    portions = pieces * ((width + PORTION - 1) // PORTION)
    threads = threads_for(rows * width * hidden, portions, most)
    job = np.empty(room_for_shares(threads) + HEADER + PIECE * pieces, np.int64)
    at = share_out(job, portions, threads)
    job[at], job[at + 1], job[at + 2] = width, hidden, last
    at += HEADER
    for matrix in range(matrices):
        for done in range(0, counts[matrix], ROWS):
            rows = min(ROWS, counts[matrix] - done)
            job[at], job[at + 1], job[at + 2] = x, panels, weights[matrix]
            job[at + 3], job[at + 4], job[at + 5] = y, y_panels, rows
            at += PIECE
            x += rows * hidden * FLOAT
            y += rows * y_stride
            panels += rows // PANEL * PANEL * hidden * FLOAT
            y_panels += rows // PANEL * PANEL * width * FLOAT
    run_job(parallel, function, job, threads)


@njit(types.void(*[types.int64] * 13), nogil=True, cache=CACHE)
def _multiply(
    parallel: Any, take_panels: Any, take_portions: Any, most: Any, in_panels: Any, matrices: Any, numbers: Any,
    x: Any, panels: Any, hidden: Any, width: Any, y: Any, y_stride: Any,
) -> None:  # fmt: skip
    counts, weights = ints_at(numbers), ints_at(numbers + matrices * INT)
    interleave_rows(parallel, take_panels, most, x, panels, in_panels, counts, matrices, hidden)
    products(
        parallel, take_portions, most, x, panels, counts, weights, matrices, hidden, width, y, y_stride, 0, y_stride
    )


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
    """Runs in every thread. `job`: see `products`; its `last` is how many bytes it is from a row of y to the next."""
    header = after_shares(job)
    width, hidden, y_stride = job[header], job[header + 1], job[header + 2]
    stride = hidden * FLOAT
    per_matrix = (width + PORTION - 1) // PORTION
    for portion in take(job, begin(job)):
        piece = header + HEADER + PIECE * (portion // per_matrix)
        first = portion % per_matrix * PORTION
        columns = min(PORTION, width - first)
        w, y = job[piece + 2] + first * stride, job[piece + 3] + first * FLOAT
        rows = job[piece + 5]
        done = rows - rows % PANEL
        panel_dots(0, done, job[piece + 1], columns, w, stride, y, y_stride, hidden)
        x, y = job[piece] + done * stride, y + done * y_stride
        dots(rows - done, x, stride, columns, w, stride, y, y_stride, hidden)


TAKE_PANELS: int = _take_panels.address
TAKE_PORTIONS: int = _take_portions.address
