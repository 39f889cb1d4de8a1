"""Products of few rows with a large matrix, on all threads of a CPU.

MKL multiplies up to about eight rows on one thread, as the threads' CPU times show (torch 2.13, MKL 2024.2), so that
weights are read at one core's bandwidth, and somewhat more rows on all threads but not well. Cut into parts by rows of
the matrix, the product is a batch, which runs on all threads, each with parts that fit its own cache. Measured on two
cores, [2048, 1024]: 1 row 19 → 35 GB/s of weights, 2 rows 11 → 19, 4 rows 8 → 16; 16 rows 52 → 91 GFLOP/s, 64 rows
88 → 145, 128 rows 107 → 158, 256 rows 155 → 169.

Shapes: T rows, D width of a row, N width of a result, P parts, M = N / P.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS = 128  # above, making one matrix of the parts' results costs what is gained
_SMALL_WEIGHTS = 1 << 18  # below, a second thread costs more than it saves
_PART_ROWS = 256  # of the matrix, in a part that more than one row is multiplied with


def linear(x_TD: Tensor, w_ND: Tensor) -> Tensor:
    """x_TD times the transpose of w_ND [T, N]."""
    rows, hidden = x_TD.shape
    if rows > FEW_ROWS or x_TD.dtype != torch.float32 or not x_TD.is_cpu:
        return F.linear(x_TD, w_ND)
    width = w_ND.shape[0]
    parts = _parts(rows, width, hidden, torch.get_num_threads())
    if parts == 1:
        return F.linear(x_TD, w_ND)
    w_PDM = w_ND.view(parts, width // parts, hidden).transpose(1, 2)
    y_PTM = torch.bmm(x_TD.expand(parts, rows, hidden), w_PDM)
    return y_PTM.view(1, width) if rows == 1 else y_PTM.transpose(0, 1).reshape(rows, width)


@functools.lru_cache
def _parts(rows: int, width: int, hidden: int, threads: int) -> int:
    """How many parts: a power of two, at least one for each thread; 1 where cutting does not help."""
    parts = 1 << (threads - 1).bit_length()
    if not rows or threads == 1 or width * hidden < _SMALL_WEIGHTS or width % parts:
        return 1
    while rows > 1 and width // parts >= 2 * _PART_ROWS and width % (2 * parts) == 0:
        parts *= 2
    return parts
