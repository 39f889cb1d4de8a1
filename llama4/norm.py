"""Root-mean-square normalisation: one operation on a CPU, where a decode step is made of hundreds of small ones.

Shapes: T rows, D width, G parts of a row that are normalised each by itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from torch import Tensor

from llama4 import openmp
from llama4.intrinsics import CACHE, float_of_bits, floats_at
from llama4.portions import run_rows, take_rows
from llama4.tiles import FLOAT


class RMSNorm:
    """x / sqrt(mean(x^2) + eps) in float32, times a weight."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype, device: torch.device | str) -> None:
        self._eps = Epsilon(eps, device)
        self.weight = torch.empty(width, dtype=dtype, device=device)

    def __call__(self, x_TD: Tensor) -> Tensor:
        if openmp.computes(x_TD):
            x_TD, y_TD = x_TD.contiguous(), torch.empty_like(x_TD, memory_format=torch.contiguous_format)
            _normalise(x_TD, y_TD, 1, self._eps, self.weight)
            return y_TD
        return (x_TD * _inverse_rms(x_TD, self._eps)).to(x_TD.dtype).mul_(self.weight)


class Epsilon:
    """What is added to a mean square, as the operations want it."""

    def __init__(self, eps: float, device: torch.device | str) -> None:
        self.scalar = torch.tensor(eps, dtype=torch.float32, device=device)
        self.bits = int(np.float32(eps).view(np.int32))


def normalise_(x_TGD: Tensor, eps: Epsilon) -> None:
    """Divides each of a row's G parts by its root mean square, in place. The parts lie one after the other."""
    if openmp.computes(x_TGD):
        _normalise(x_TGD, x_TGD, x_TGD.shape[1], eps, None)
    else:
        x_TGD.mul_(_inverse_rms(x_TGD, eps))


def _inverse_rms(x: Tensor, eps: Epsilon) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, which stays with size 1; float32.

    Three operations: torch's own rms_norm is a dozen.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return torch.addcmul(eps.scalar, norm, norm, value=1 / x.shape[-1]).rsqrt_()


def _normalise(x: Tensor, y: Tensor, parts: int, eps: Epsilon, weight_D: Tensor | None) -> None:
    rows, width = x.shape[0], x.shape[-1]
    weight = 0 if weight_D is None else weight_D.data_ptr()
    strides = (x.stride(0) * FLOAT, y.stride(0) * FLOAT)
    about = parts, width, x.data_ptr(), y.data_ptr(), *strides, weight, eps.bits
    run_rows(_TAKE_ROWS, rows, about, rows * parts * width)


@njit(fastmath=True, cache=CACHE)
def _normalise_part(x: Any, y: Any, weight: Any, width: Any, eps: Any) -> None:
    x_D, y_D = carray(floats_at(x), (width,)), carray(floats_at(y), (width,))
    total = np.float32(0)
    for d in range(width):
        total += x_D[d] * x_D[d]
    inverse = np.float32(1) / np.sqrt(total / np.float32(width) + eps)
    if weight:
        weight_D = carray(floats_at(weight), (width,))
        for d in range(width):
            y_D[d] = x_D[d] * inverse * weight_D[d]
    else:
        for d in range(width):
            y_D[d] = x_D[d] * inverse


@cfunc(types.void(types.CPointer(types.int64)), cache=CACHE)
def _take_rows(job: Any) -> None:
    """Runs in every thread. `job`: portions taken; T, G, D; addresses of x and y; their rows' strides; weight; eps."""
    parts, width, weight, eps = job[2], job[3], job[8], float_of_bits(np.int32(job[9]))
    for row in take_rows(job):
        x, y = job[4] + row * job[6], job[5] + row * job[7]
        for part in range(parts):
            at = part * width * FLOAT
            _normalise_part(x + at, y + at, weight, width, eps)


_TAKE_ROWS: int = _take_rows.address
