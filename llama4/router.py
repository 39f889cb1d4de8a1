"""The router's choice of one expert for each row, as one operation on a CPU: torch's six cost a decode step as much as
reading some of the weights.

Shapes: T tokens, E experts, D model width.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from torch import Tensor

from llama4 import openmp
from llama4.intrinsics import CACHE, fetch_add, floats_at, ints_at, run_parallel
from llama4.tiles import FLOAT

_PORTION = 16  # rows that a thread takes at a time
_SMALL = 1 << 15  # floats; below, a second thread costs more than it saves


def choose_one(logits_TE: Tensor, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Each row times the sigmoid of its largest logit [T, D], and whose that is, int64 [T, 1]; of equal ones the first.

    The sigmoid is computed in float64, so that no row's last bit depends on the others.
    """
    if not openmp.computes(x_TD):
        chosen_T1, expert_ids_T1 = logits_TE.max(dim=-1, keepdim=True)
        return x_TD * torch.sigmoid(chosen_T1.double()).to(x_TD.dtype), expert_ids_T1
    x_TD = x_TD.contiguous()
    (rows, width), experts = x_TD.shape, logits_TE.shape[1]
    y_TD, expert_ids_T1 = torch.empty((rows, width)), torch.empty((rows, 1), dtype=torch.int64)
    _choose_all(
        openmp.address(), _TAKE_ROWS, torch.get_num_threads(), rows, experts, width, logits_TE.data_ptr(),
        logits_TE.stride(0) * FLOAT, x_TD.data_ptr(), y_TD.data_ptr(), expert_ids_T1.data_ptr(),
    )  # fmt: skip
    return y_TD, expert_ids_T1


@njit(cache=CACHE)
def _choose_rows(job: Any) -> None:
    """Some rows, again and again, until all are taken.

    `job`: portions taken; T, E, D; the logits' address and their rows' stride; addresses of x, y and the choices.
    """
    rows, experts, width = job[1], job[2], job[3]
    first = _PORTION * fetch_add(job, 0, 1)
    while first < rows:
        for row in range(first, min(first + _PORTION, rows)):
            logits_E = carray(floats_at(job[4] + row * job[5]), (experts,))
            best = 0
            for expert in range(1, experts):
                if logits_E[expert] > logits_E[best]:
                    best = expert
            score = np.float32(1 / (1 + math.exp(-np.float64(logits_E[best]))))
            x_D = carray(floats_at(job[6] + row * width * FLOAT), (width,))
            y_D = carray(floats_at(job[7] + row * width * FLOAT), (width,))
            for d in range(width):
                y_D[d] = x_D[d] * score
            ints_at(job[8])[row] = best
        first = _PORTION * fetch_add(job, 0, 1)


@cfunc(types.void(types.CPointer(types.int64)), cache=CACHE)
def _take_rows(job: Any) -> None:
    """Runs in every thread."""
    _choose_rows(job)


@njit(types.void(*[types.int64] * 11), nogil=True, cache=CACHE)
def _choose_all(
    parallel: Any, take_rows: Any, threads: Any, rows: Any, experts: Any, width: Any, logits: Any, stride: Any, x: Any,
    y: Any, chosen: Any,
) -> None:  # fmt: skip
    job = np.empty(9, np.int64)
    job[:5] = 0, rows, experts, width, logits
    job[5:] = stride, x, y, chosen
    if rows * width < _SMALL:
        _choose_rows(ints_at(job.ctypes.data))
    else:
        run_parallel(parallel, take_rows, job.ctypes.data, threads)
    job[0] = 0  # it lives until here


_TAKE_ROWS: int = _take_rows.address
