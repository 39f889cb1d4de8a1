"""Gated MLPs on CPUs: down(silu(gate(x)) * up(x)), whose inner activations are never laid out as rows.

A thread computes some outputs of the gate and the same ones of up, combines them while they are in its nearest cache,
and leaves them interleaved as the product with `down` reads them. A row's result has the same bits as by `row_products`
and whatever else is in the batch.

Shapes: T rows, D model width, I an MLP's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numba import carray, cfunc, njit, types
from torch import Tensor

from llama4 import openmp
from llama4.intrinsics import CACHE, PANEL, floats_at
from llama4.portions import after_shares, begin, shares, take
from llama4.product_tiles import gate_tile
from llama4.row_products import ROWS, interleaved, pieces_of, products_of, threads_for
from llama4.tiles import FLOAT, dots, panel_dots, place_in_panel

_PORTION = 48  # outputs of the gate, and of up, that a thread takes at a time
assert _PORTION % PANEL == 0
_SCRATCH = 2 * ROWS * _PORTION  # floats of a thread
_HEADER = 3
_PIECE = 6


def gated_products(x_TD: Tensor, gate_ups: Sequence[Tensor], downs: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Rows through MLPs of one shape [T, D]: counts[i] consecutive rows by gate_ups[i] [2I, D] and downs[i] [D, I].

    All are float32 on the CPU and the weights contiguous; the caller sees to that, and that the counts sum up to T. The
    rows of the result may have space between them.
    """
    x_TD = x_TD.contiguous()
    (rows, hidden), width = x_TD.shape, downs[0].shape[1]
    panels = interleaved(x_TD, counts)
    h_panels = None if panels is None else torch.empty((len(panels), width, PANEL))
    threads = threads_for(rows * hidden * width)
    inner = torch.empty(rows * width + threads * _SCRATCH)
    h_TI, scratch = inner[: rows * width].view(rows, width), inner.data_ptr() + rows * width * FLOAT
    pieces = pieces_of(x_TD, panels, gate_ups, counts)
    h_pieces = pieces_of(h_TI, h_panels, downs, counts)
    job = shares(len(pieces) * -(-width // _PORTION), threads)
    job += (width, hidden, scratch)
    for (x, panel, w, _, some), (h, h_panel, _, _, _) in zip(pieces, h_pieces, strict=True):
        job += (x, panel, w, h, h_panel, some)
    openmp.run(_TAKE_PORTIONS, job, threads)
    return products_of(h_pieces, rows, downs[0].shape)


@njit(cache=CACHE)
def _panels(
    rows: Any, panels: Any, gate_w: Any, up_w: Any, first: Any, columns: Any, width: Any, hidden: Any, gate: Any, h: Any
) -> None:  # fmt: skip
    stride, up = hidden * FLOAT, gate + _SCRATCH // 2 * FLOAT
    panel_dots(1, rows, panels, columns, gate_w, stride, gate, _PORTION * PANEL * FLOAT, hidden)
    panel_dots(1, rows, panels, columns, up_w, stride, up, _PORTION * PANEL * FLOAT, hidden)
    for panel in range(rows // PANEL):
        for c in range(columns):
            at = (panel * _PORTION + c) * PANEL * FLOAT
            place = panel * width + place_in_panel(first + c, width)
            gate_tile(gate + at, up + at, h + place * PANEL * FLOAT)


@njit(cache=CACHE)
def _rows(
    rows: Any, x: Any, gate_w: Any, up_w: Any, first: Any, columns: Any, width: Any, hidden: Any, gate: Any, h: Any
) -> None:  # fmt: skip
    stride, up = hidden * FLOAT, gate + _SCRATCH // 2 * FLOAT
    dots(rows, x, stride, columns, gate_w, stride, gate, _PORTION * FLOAT, hidden)
    dots(rows, x, stride, columns, up_w, stride, up, _PORTION * FLOAT, hidden)
    for row in range(rows):
        at = row * _PORTION * FLOAT
        for c in range(0, columns, PANEL):
            gate_tile(gate + at + c * FLOAT, up + at + c * FLOAT, gate + at + c * FLOAT)
        from_C = carray(floats_at(gate + at), (columns,))
        to_C = carray(floats_at(h + (row * width + first) * FLOAT), (columns,))
        for c in range(columns):
            to_C[c] = from_C[c]


@cfunc(types.void(types.CPointer(types.int64)), cache=CACHE)
def _take_portions(job: Any) -> None:
    """Runs in every thread.

    `job`: the shares; I, D; the address of the threads' scratch; for each piece the addresses of x, its panels,
    the gate's weights, h and its panels; its T.
    """
    header, thread = after_shares(job), begin(job)
    width, hidden = job[header], job[header + 1]
    scratch = job[header + 2] + thread * _SCRATCH * FLOAT
    per_matrix = (width + _PORTION - 1) // _PORTION
    for portion in take(job, thread):
        piece = header + _HEADER + _PIECE * (portion // per_matrix)
        first = portion % per_matrix * _PORTION
        columns = min(_PORTION, width - first)
        gate_w = job[piece + 2] + first * hidden * FLOAT
        up_w = gate_w + width * hidden * FLOAT
        rows = job[piece + 5]
        done = rows - rows % PANEL
        _panels(done, job[piece + 1], gate_w, up_w, first, columns, width, hidden, scratch, job[piece + 4])
        x, h = job[piece] + done * hidden * FLOAT, job[piece + 3] + done * width * FLOAT
        _rows(rows - done, x, gate_w, up_w, first, columns, width, hidden, scratch, h)


_TAKE_PORTIONS: int = _take_portions.address
