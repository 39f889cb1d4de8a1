"""Gated MLPs on CPUs: down(silu(gate(x)) * up(x)), whose inner activations are never laid out as rows.

A thread computes some outputs of the gate and the same ones of up, combines them while they are in its nearest cache,
and leaves them interleaved as the product with `down` reads them. A row's result has the same bits as by `row_products`
and whatever else is in the batch.

Shapes: T rows, D model width, I an MLP's width.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from numba import carray, cfunc, njit, types
from torch import Tensor

from llama4 import openmp
from llama4.intrinsics import CACHE, PANEL, floats_at, ints_at
from llama4.portions import after_shares, begin, take
from llama4.product_tiles import gate_tile
from llama4.row_products import (
    HEADER,
    PIECE,
    PORTION,
    ROWS,
    TAKE_PANELS,
    TAKE_PORTIONS,
    interleave_rows,
    products,
    room_for,
    rows_in_panels,
)
from llama4.tiles import FLOAT, INT, dots, panel_dots, place_in_panel

assert PORTION % PANEL == 0  # outputs of the gate, and of up, that a thread takes at a time
_SCRATCH = 2 * ROWS * PORTION  # floats of a thread


def gated_products(x_TD: Tensor, gate_ups: Sequence[Tensor], downs: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Rows through MLPs of one shape [T, D]: counts[i] consecutive rows by gate_ups[i] [2I, D] and downs[i] [D, I].

    All are float32 on the CPU and the weights contiguous; the caller sees to that, and that the counts sum up to T. The
    rows of the result may have space between them.
    """
    x_TD = x_TD.contiguous()
    rows, hidden = x_TD.shape
    (outputs, width), threads = downs[0].shape, torch.get_num_threads()
    y_TD = room_for(rows, outputs, counts)
    in_panels = rows_in_panels(counts)
    inner = torch.empty(in_panels * (hidden + width) + rows * width + threads * _SCRATCH)
    numbers = array("q", [*counts, *[w.data_ptr() for w in (*gate_ups, *downs)]])
    _multiply(
        openmp.address(), TAKE_PANELS, _TAKE_PORTIONS, TAKE_PORTIONS, threads, rows, in_panels,
        len(counts), numbers.buffer_info()[0], x_TD.data_ptr(), inner.data_ptr(), hidden, width, outputs,
        y_TD.data_ptr(), y_TD.stride(0) * FLOAT,
    )  # fmt: skip
    return y_TD


@njit(types.void(*[types.int64] * 16), nogil=True, cache=CACHE)
def _multiply(
    parallel: Any, take_panels: Any, take_gated: Any, take_portions: Any, most: Any, rows: Any, in_panels: Any,
    matrices: Any, numbers: Any, x: Any, inner: Any, hidden: Any, width: Any, outputs: Any, y: Any, y_stride: Any,
) -> None:  # fmt: skip
    """`inner`: room for the panels of x, those of h, h and the threads' scratch, one after the other."""
    counts = ints_at(numbers)
    gate_ups, downs = ints_at(numbers + matrices * INT), ints_at(numbers + 2 * matrices * INT)
    h_panels = inner + in_panels * hidden * FLOAT
    h = h_panels + in_panels * width * FLOAT
    scratch = h + rows * width * FLOAT
    interleave_rows(parallel, take_panels, most, x, inner, in_panels, counts, matrices, hidden)
    products(
        parallel, take_gated, most, x, inner, counts, gate_ups, matrices, hidden, width, h, width * FLOAT, h_panels,
        scratch,
    )  # fmt: skip
    products(
        parallel, take_portions, most, h, h_panels, counts, downs, matrices, width, outputs, y, y_stride, 0, y_stride
    )


@njit(cache=CACHE)
def _panels(
    rows: Any, panels: Any, gate_w: Any, up_w: Any, first: Any, columns: Any, width: Any, hidden: Any, gate: Any, h: Any
) -> None:  # fmt: skip
    stride, up = hidden * FLOAT, gate + _SCRATCH // 2 * FLOAT
    panel_dots(1, rows, panels, columns, gate_w, stride, gate, PORTION * PANEL * FLOAT, hidden)
    panel_dots(1, rows, panels, columns, up_w, stride, up, PORTION * PANEL * FLOAT, hidden)
    for panel in range(rows // PANEL):
        for c in range(columns):
            at = (panel * PORTION + c) * PANEL * FLOAT
            place = panel * width + place_in_panel(first + c, width)
            gate_tile(gate + at, up + at, h + place * PANEL * FLOAT)


@njit(cache=CACHE)
def _rows(
    rows: Any, x: Any, gate_w: Any, up_w: Any, first: Any, columns: Any, width: Any, hidden: Any, gate: Any, h: Any
) -> None:  # fmt: skip
    stride, up = hidden * FLOAT, gate + _SCRATCH // 2 * FLOAT
    dots(rows, x, stride, columns, gate_w, stride, gate, PORTION * FLOAT, hidden)
    dots(rows, x, stride, columns, up_w, stride, up, PORTION * FLOAT, hidden)
    for row in range(rows):
        at = row * PORTION * FLOAT
        for c in range(0, columns, PANEL):
            gate_tile(gate + at + c * FLOAT, up + at + c * FLOAT, gate + at + c * FLOAT)
        from_C = carray(floats_at(gate + at), (columns,))
        to_C = carray(floats_at(h + (row * width + first) * FLOAT), (columns,))
        for c in range(columns):
            to_C[c] = from_C[c]


@cfunc(types.void(types.CPointer(types.int64)), cache=CACHE)
def _take_portions(job: Any) -> None:
    """Runs in every thread. `job`: see `products`; its `last` is the address of the threads' scratch."""
    header, thread = after_shares(job), begin(job)
    width, hidden = job[header], job[header + 1]
    scratch = job[header + 2] + thread * _SCRATCH * FLOAT
    per_matrix = (width + PORTION - 1) // PORTION
    for portion in take(job, thread):
        piece = header + HEADER + PIECE * (portion // per_matrix)
        first = portion % per_matrix * PORTION
        columns = min(PORTION, width - first)
        gate_w = job[piece + 2] + first * hidden * FLOAT
        up_w = gate_w + width * hidden * FLOAT
        rows = job[piece + 5]
        done = rows - rows % PANEL
        _panels(done, job[piece + 1], gate_w, up_w, first, columns, width, hidden, scratch, job[piece + 4])
        x, h = job[piece] + done * hidden * FLOAT, job[piece + 3] + done * width * FLOAT
        _rows(rows - done, x, gate_w, up_w, first, columns, width, hidden, scratch, h)


_TAKE_PORTIONS: int = _take_portions.address
