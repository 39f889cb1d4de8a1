"""Runs compiled functions on torch's own OpenMP threads.

A second pool would compete with them for the cores, since idle OpenMP threads spin for a while.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

_log = logging.getLogger(__name__)


def available() -> bool:
    """Whether torch computes with an OpenMP library that can run compiled functions."""
    return _parallel() is not None


def suits(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether functions compiled for the CPU take rows of this kind."""
    return dtype == torch.float32 and device.type == "cpu" and available()


def computes(x: torch.Tensor) -> bool:
    """Whether they take these rows; there has to be one."""
    return x.is_cpu and x.dtype == torch.float32 and x.shape[0] > 0 and available()


def run(function: int, job: Sequence[int], threads: int | None = None) -> None:
    """Calls the numba cfunc at this address with `job` in so many of torch's threads, or all; returns when these have.

    The threads share `job`, as int64; they take their parts by counters in it. Few words of Python on purpose: reading
    weights empties the caches of everything else, and what comes between takes four times as long as in a loop.
    """
    parallel = _parallel()
    assert parallel is not None, "see available"
    shared = array("q", job)
    parallel(function, shared.buffer_info()[0], threads or torch.get_num_threads(), 0)


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
