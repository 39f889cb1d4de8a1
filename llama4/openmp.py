"""Runs compiled functions on torch's own OpenMP threads.

A second pool would compete with them for the cores, since idle OpenMP threads spin for a while.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

_log = logging.getLogger(__name__)


def available() -> bool:
    """Whether torch computes with an OpenMP library that can run compiled functions."""
    return _parallel() is not None


def run(function: Any, job: NDArray[np.int64]) -> None:
    """Calls `function`, a numba cfunc, with `job` in each of torch's threads; returns when all have returned.

    The threads share `job`; they take their parts by counters in it.
    """
    parallel = _parallel()
    assert parallel is not None, "see available"
    parallel(function.address, job.ctypes.data, torch.get_num_threads(), 0)


@functools.cache
def _parallel() -> Callable[..., None] | None:
    """`GOMP_parallel(function, argument, threads, flags)` of the OpenMP library that torch has loaded.

    It is a part of libgomp's binary interface, which LLVM's and Intel's libraries offer as well.
    """
    for library in (Path(torch.__file__).parent / "lib").glob("lib*omp*"):
        parallel: Any = getattr(ctypes.CDLL(str(library)), "GOMP_parallel", None)
        if parallel is not None:
            parallel.restype, parallel.argtypes = None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            return cast("Callable[..., None]", parallel)
    _log.warning("torch's OpenMP library was not found: decoding on the CPU is left to BLAS and torch, and slower")
    return None
