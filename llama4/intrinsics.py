"""What the CPU kernels need and numba has no word for: addresses, atomic counters; and the shapes of their tiles."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import njit, types
from numba.extending import intrinsic

from llama4.emitter import FLOAT32, LANES, Emitter

_HERE = Path(__file__).parent
_PARTS = (
    "emitter.py",
    "intrinsics.py",
    "portions.py",
    "product_tiles.py",
    "row_products.py",
    "softmax_tiles.py",
    "tiles.py",
)


def _cache_directory() -> Path | None:
    """Beside the code, or else in the user's home; None if nothing can be kept.

    Compiling takes half a minute, so its results are kept. numba itself only looks at the file of the outermost
    function to see whether they are up to date, so what all of them share is in the name.
    """
    shared = b"".join((_HERE / name).read_bytes() for name in _PARTS)
    for place in (str(_HERE / "__pycache__"), "~/.cache/herder"):
        with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: nobody's home
            parent = Path(place).expanduser()
            parent.mkdir(parents=True, exist_ok=True)
            if os.access(parent, os.W_OK):
                return parent / hashlib.blake2b(shared, digest_size=8).hexdigest()
    return None


_kept = _cache_directory()
CACHE = _kept is not None
if CACHE:
    numba.config.CACHE_DIR = str(_kept)

PANEL = 2 * LANES  # rows of a panel
# Rows of a panel have no order, and take the widest registers. Of panel_tiles, (panels, columns), the largest computes
# with most of them: 24 sums and four vectors of rows at once, of 32. AVX2 has half as many, of half the size.
_WIDE_REGISTERS = bool(get_host_cpu_features().get("avx512f"))
LARGE, MEDIUM, SMALL = ((4, 6), (2, 8), (1, 8)) if _WIDE_REGISTERS else ((1, 6),) * 3
SIDE, OUTER_COLUMNS = (2 * PANEL, 8) if _WIDE_REGISTERS else (PANEL, 4)  # of an outer_tile
UNSEEN = -1e30  # a score below all others
WIDE = ir.VectorType(FLOAT32, PANEL if _WIDE_REGISTERS else LANES)


def _cast(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))


@intrinsic
def floats_at(typing_context: Any, address: Any) -> Any:
    """The address as a pointer to float32."""
    return types.CPointer(types.float32)(types.int64), _cast


@intrinsic
def ints_at(typing_context: Any, address: Any) -> Any:
    """The address as a pointer to int64."""
    return types.CPointer(types.int64)(types.int64), _cast


@intrinsic
def _call_parallel(typing_context: Any, parallel: Any, function: Any, job: Any, threads: Any) -> Any:

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), (pointer, pointer, number, number))
        call = builder.inttoptr(arguments[0], kind.as_pointer())
        taken, shared = (builder.inttoptr(argument, pointer) for argument in arguments[1:3])
        builder.call(call, (taken, shared, builder.trunc(arguments[3], number), number(0)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


@njit(cache=CACHE)
def run_job(parallel: Any, function: Any, job: Any, threads: Any) -> None:
    """What `openmp.run` does, in compiled code: `parallel` is `openmp.address()`, and `job` an array.

    Its caller's hold on the array keeps it for the threads; in the same function it could end before they do.
    """
    _call_parallel(parallel, function, job.ctypes.data, threads)


@intrinsic
def float_of_bits(typing_context: Any, bits: Any) -> Any:
    """The float32 that has these 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], FLOAT32)

    return types.float32(types.int32), generate


@intrinsic
def prefetch(typing_context: Any, address: Any) -> Any:
    """Begins to bring the cache line at this address into the cache; any address is allowed."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        Emitter(builder).prefetch(arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def fetch_add(typing_context: Any, pointer: Any, index: Any, amount: Any) -> Any:
    """Adds to pointer[index] in one step and returns what was there before; orders all reads and writes around it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base, offset, increment = arguments
        return builder.atomic_rmw("add", builder.gep(base, [offset]), increment, "seq_cst")

    return types.int64(types.CPointer(types.int64), types.int64, types.int64), generate
