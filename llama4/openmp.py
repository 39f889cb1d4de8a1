"""Runs compiled functions on torch's own OpenMP threads.

A second pool would compete with them for the cores, since idle OpenMP threads spin for a while.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
import os
import threading
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


def run(function: int, job: Sequence[int], portions: int) -> None:
    """Calls the numba cfunc at this address with `job` in torch's threads, and returns when they have done it.

    There are no more of them than portions: one that finds nothing to do costs the others the wait for its waking.

    The threads share `job`, as int64; they take their parts by counters in it. Few words of Python on purpose: reading
    weights empties the caches of everything else, and what comes between takes four times as long as in a loop.
    """
    parallel = _parallel()
    assert parallel is not None, "see available"
    shared = array("q", job)
    parallel(function, shared.buffer_info()[0], min(portions, torch.get_num_threads()), 0)


@functools.cache
def address() -> int:
    """Of the function by which `run` runs others, for compiled code that does so itself; see available."""
    return ctypes.cast(cast(Any, _parallel()), ctypes.c_void_p).value or 0


def bind_threads(first: int) -> None:
    """Binds this thread, and those that it computes with, to a CPU each, in turn from this one's place on.

    Only where torch has as many threads here as the process may use CPUs. Two processes that share two cores otherwise
    lose a tenth of their time: woken for a piece of work, a thread is often queued behind its own process' other one,
    and the other core stays idle until the scheduler's next tick.
    """
    parallel, threads = _parallel(), torch.get_num_threads()
    if parallel is None or threads == 1 or not hasattr(os, "sched_setaffinity"):
        return
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) != threads:
        return
    caller, others = threading.get_native_id(), itertools.count(first + 1)

    def take_a_place(_: int | None) -> None:
        place = first if threading.get_native_id() == caller else next(others)
        os.sched_setaffinity(0, {cpus[place % threads]})

    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(take_a_place)  # called by each thread, once
    parallel(ctypes.cast(function, ctypes.c_void_p), None, threads, 0)


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
