"""The router's choice of experts for each row; of one, as Llama 4 has it, a single operation on a CPU.

Torch's six are small, but come between two products: memory stands idle in a decode step meanwhile.

Shapes: T tokens, E experts, K experts per token, N = T * K rows, D model width.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, types
from torch import Tensor

from llama4 import openmp
from llama4.intrinsics import CACHE, floats_at, ints_at
from llama4.portions import run_rows, take_rows
from llama4.tiles import FLOAT


def best(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Each row's largest logits and whose they are [T, K]."""
    if top_k == 1:  # half the time of topk
        largest = logits_TE.max(dim=-1, keepdim=True)
        return largest.values, largest.indices
    return torch.topk(logits_TE, top_k, dim=-1)


def scaled_rows(logits_TE: Tensor, x_TD: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Each row times the sigmoids of its largest logits [N, D], and whose these are, int64 [N, 1].

    So each (token, choice) has an input of its own, and is a row with one expert. The sigmoid is computed in float64:
    torch's vectors and the rest that fills none differ in a float32's last bit.
    """
    if top_k == 1 and openmp.computes(x_TD):
        return _scaled_by_best(logits_TE, x_TD.contiguous())
    chosen_TK, expert_ids_TK = best(logits_TE, top_k)
    scores_TK1 = torch.sigmoid(chosen_TK.double()).to(x_TD.dtype)[:, :, None]
    return (x_TD[:, None] * scores_TK1).flatten(0, 1), expert_ids_TK.reshape(-1, 1)


def _scaled_by_best(logits_TE: Tensor, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """As scaled_rows; of equal logits the first."""
    (rows, width), experts = x_TD.shape, logits_TE.shape[1]
    y_TD, expert_ids_T1 = torch.empty((rows, width)), torch.empty((rows, 1), dtype=torch.int64)
    addresses = x_TD.data_ptr(), y_TD.data_ptr(), expert_ids_T1.data_ptr()
    about = experts, width, logits_TE.data_ptr(), logits_TE.stride(0) * FLOAT, *addresses
    run_rows(_TAKE_ROWS, rows, about, rows * width)
    return y_TD, expert_ids_T1


@cfunc(types.void(types.CPointer(types.int64)), cache=CACHE)
def _take_rows(job: Any) -> None:
    """Runs in every thread.

    `job`: see `run_rows`; E, D; the logits' address and their rows' stride; addresses of x, y and the choices.
    """
    experts, width = job[2], job[3]
    for row in take_rows(job):
        logits_E = carray(floats_at(job[4] + row * job[5]), (experts,))
        chosen = 0
        for expert in range(1, experts):
            if logits_E[expert] > logits_E[chosen]:
                chosen = expert
        score = np.float32(1 / (1 + math.exp(-np.float64(logits_E[chosen]))))
        x_D = carray(floats_at(job[6] + row * width * FLOAT), (width,))
        y_D = carray(floats_at(job[7] + row * width * FLOAT), (width,))
        for d in range(width):
            y_D[d] = x_D[d] * score
        ints_at(job[8])[row] = chosen


_TAKE_ROWS: int = _take_rows.address
