"""Products of few rows with a large matrix, at the rate at which all threads of a CPU can read the matrix.

BLAS libraries are made for many rows: with two to eight they read weights at half of the memory's bandwidth or less.
Here each row of the matrix is read once and multiplied with up to four rows while it is in registers (by numba).

The work runs on torch's own OpenMP threads: a second pool would compete with them for the cores, since idle OpenMP
threads spin for a while. Whoever is free takes the next few rows of the matrix, so a busy core holds up nobody.

Shapes: T rows, D width of a row, N width of a result.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic
from torch import Tensor

_PORTION = 48  # rows of the matrix that a thread takes at a time
_CACHE = os.access(Path(__file__).parent, os.W_OK)  # beside this file, where compiling takes a second the first time
_log = logging.getLogger(__name__)


def few_rows(x_TD: Tensor, w_ND: Tensor) -> Tensor:
    """x_TD times the transpose of w_ND [T, N]: float32 tensors on the CPU, `w_ND` contiguous."""
    assert w_ND.is_contiguous() and x_TD.dtype == w_ND.dtype == torch.float32
    rows, hidden = x_TD.shape
    width = w_ND.shape[0]
    x_TD = x_TD.contiguous()
    y_TN = torch.empty((rows, width))
    job = (ctypes.c_int64 * 7)(x_TD.data_ptr(), w_ND.data_ptr(), y_TN.data_ptr(), rows, width, hidden, 0)
    parallel = _parallel()
    assert parallel is not None, "see available"
    parallel(_take_portions.address, job, torch.get_num_threads(), 0)
    return y_TN


def available() -> bool:
    """Whether torch computes with an OpenMP library that can run this."""
    return _parallel() is not None


@functools.cache
def _parallel() -> Callable[..., None] | None:
    """`GOMP_parallel(function, argument, threads, flags)` of the OpenMP library that torch has loaded.

    It is a part of libgomp's binary interface, which LLVM's and Intel's libraries offer as well.
    """
    for library in (Path(torch.__file__).parent / "lib").glob("lib*omp*"):
        run: Any = getattr(ctypes.CDLL(str(library)), "GOMP_parallel", None)
        if run is not None:
            run.restype, run.argtypes = None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            return cast("Callable[..., None]", run)
    _log.warning("torch's OpenMP library was not found: products of few rows are left to BLAS")
    return None


@intrinsic
def _floats_at(typing_context: Any, address: Any) -> Any:
    """The address as a pointer to float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.int64), generate


@intrinsic
def _fetch_add(typing_context: Any, pointer: Any, index: Any, amount: Any) -> Any:
    """Adds to pointer[index] in one step; returns what was there before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base, offset, increment = arguments
        return builder.atomic_rmw("add", builder.gep(base, [offset]), increment, "monotonic")

    return types.int64(types.CPointer(types.int64), types.int64, types.int64), generate


@njit(fastmath=True, cache=_CACHE)
def _three_columns(x_TD: Any, w_ND: Any, y_TN: Any, n: int) -> None:
    """Columns n to n + 2 of the result, four rows at a time: twelve sums are what the registers of AVX2 hold."""
    rows, hidden = x_TD.shape
    t = 0
    while t + 3 < rows:
        a0 = a1 = a2 = b0 = b1 = b2 = c0 = c1 = c2 = d0 = d1 = d2 = np.float32(0)
        for d in range(hidden):
            w0, w1, w2 = w_ND[n, d], w_ND[n + 1, d], w_ND[n + 2, d]
            x = x_TD[t, d]
            a0, a1, a2 = a0 + x * w0, a1 + x * w1, a2 + x * w2
            x = x_TD[t + 1, d]
            b0, b1, b2 = b0 + x * w0, b1 + x * w1, b2 + x * w2
            x = x_TD[t + 2, d]
            c0, c1, c2 = c0 + x * w0, c1 + x * w1, c2 + x * w2
            x = x_TD[t + 3, d]
            d0, d1, d2 = d0 + x * w0, d1 + x * w1, d2 + x * w2
        y_TN[t, n], y_TN[t, n + 1], y_TN[t, n + 2] = a0, a1, a2
        y_TN[t + 1, n], y_TN[t + 1, n + 1], y_TN[t + 1, n + 2] = b0, b1, b2
        y_TN[t + 2, n], y_TN[t + 2, n + 1], y_TN[t + 2, n + 2] = c0, c1, c2
        y_TN[t + 3, n], y_TN[t + 3, n + 1], y_TN[t + 3, n + 2] = d0, d1, d2
        t += 4
    if t + 1 < rows:
        a0 = a1 = a2 = b0 = b1 = b2 = np.float32(0)
        for d in range(hidden):
            w0, w1, w2 = w_ND[n, d], w_ND[n + 1, d], w_ND[n + 2, d]
            x = x_TD[t, d]
            a0, a1, a2 = a0 + x * w0, a1 + x * w1, a2 + x * w2
            x = x_TD[t + 1, d]
            b0, b1, b2 = b0 + x * w0, b1 + x * w1, b2 + x * w2
        y_TN[t, n], y_TN[t, n + 1], y_TN[t, n + 2] = a0, a1, a2
        y_TN[t + 1, n], y_TN[t + 1, n + 1], y_TN[t + 1, n + 2] = b0, b1, b2
        t += 2
    if t < rows:
        for column in range(n, n + 3):
            y_TN[t, column] = _dot(x_TD, w_ND, t, column)


@njit(fastmath=True, cache=_CACHE)
def _dot(x_TD: Any, w_ND: Any, t: int, n: int) -> Any:
    total = np.float32(0)
    for d in range(x_TD.shape[1]):
        total += x_TD[t, d] * w_ND[n, d]
    return total


@cfunc(types.void(types.CPointer(types.int64)), cache=_CACHE)
def _take_portions(job: Any) -> None:
    """Runs in every thread. `job`: addresses of x, w and y; T, N, D; columns of the result that are taken."""
    rows, width, hidden = job[3], job[4], job[5]
    x_TD = carray(_floats_at(job[0]), (rows, hidden))
    w_ND = carray(_floats_at(job[1]), (width, hidden))
    y_TN = carray(_floats_at(job[2]), (rows, width))
    first = _fetch_add(job, 6, _PORTION)
    while first < width:
        last = min(first + _PORTION, width)
        n = first
        while n + 2 < last:
            _three_columns(x_TD, w_ND, y_TN, n)
            n += 3
        while n < last:
            for t in range(rows):
                y_TN[t, n] = _dot(x_TD, w_ND, t, n)
            n += 1
        first = _fetch_add(job, 6, _PORTION)
