"""Attention of a prompt's rows, on CPUs in float32: queries side by side, keys and values a block at a time.

A task is SIDE consecutive queries of one head: they lie interleaved, so that a key times all of them is a few vectors,
and the softmax needs no sums over lanes. Blocks of keys are counted from the window's first key, and what a query may
not see adds nothing, so that no bit of a row depends on the rows beside it: a prompt may be cut anywhere. Nor does it
make a difference whether a row comes alone, by `paged_attention`. Scores of a block never leave the nearest caches; the
blocks' softmax sums are merged as they come (Dao et al., "FlashAttention", 2022).

Shapes: T rows, L keys of the window, H query heads, K key/value heads, G = H / K, E head width, S = SIDE.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from torch import Tensor

from llama4 import openmp
from llama4.emitter import LANES
from llama4.intrinsics import CACHE, OUTER_COLUMNS, SIDE, UNSEEN, fetch_add, floats_at
from llama4.softmax_tiles import outer_tile, weigh_tile
from llama4.tiles import FLOAT

BLOCK = 128  # keys
assert BLOCK % LANES == 0


@njit(fastmath=True, cache=CACHE)
def _take_queries(q: Any, q_stride: Any, queries: Any, width: Any, q_ES: Any) -> None:
    """Interleaves and scales the queries; missing ones are the last one again."""
    scale = np.float32(1 / np.sqrt(width))
    for s in range(SIDE):
        q_E = carray(floats_at(q + min(s, queries - 1) * q_stride), (width,))
        for e in range(width):
            q_ES[e, s] = scale * q_E[e]


@njit(cache=CACHE)
def _sums(a: Any, b: Any, b_step: Any, b_column: Any, count: Any, columns: Any, y: Any) -> None:
    """As `outer_tile`, for any number of columns."""
    whole, size = columns - columns % OUTER_COLUMNS, SIDE * FLOAT
    for c in range(0, whole, OUTER_COLUMNS):
        outer_tile(OUTER_COLUMNS, a, b + c * b_column, b_step, b_column, count, y + c * size)
    for c in range(whole, columns):
        outer_tile(1, a, b + c * b_column, b_step, b_column, count, y + c * size)


@njit(cache=CACHE)
def _hide(scores_KS: Any, keys: Any, seen: Any) -> Any:
    """Query s sees the first `seen` + s of the keys. Returns how many they are with unseen ones that fill them up."""
    for key in range(max(seen, 0), keys):
        for s in range(min(SIDE, key - seen + 1)):
            scores_KS[key, s] = UNSEEN
    all_keys = (keys + LANES - 1) // LANES * LANES
    scores_KS[keys:all_keys] = UNSEEN
    return all_keys


@njit(cache=CACHE)
def _merge(out_ES: Any, block_ES: Any, scales_2S: Any) -> None:
    """Not as a fused operation: `paged_attention` does the same."""
    for e in range(len(out_ES)):
        for s in range(SIDE):
            out_ES[e, s] = out_ES[e, s] * scales_2S[0, s] + block_ES[e, s] * scales_2S[1, s]


@njit(cache=CACHE)
def _attend(
    q: Any, q_stride: Any, queries: Any, k: Any, v: Any, seen: Any, width: Any, scratch: Any, out: Any, out_stride: Any
) -> None:  # fmt: skip
    """Up to SIDE queries of one head, of which the first sees `seen` keys, and each next one one more."""
    out_ES, q_ES, block_ES = scratch[:width], scratch[width : 2 * width], scratch[2 * width : 3 * width]
    rest = scratch[3 * width :]
    scores_KS, sums_2S, scales_2S = rest[:BLOCK], rest[BLOCK : BLOCK + 2], rest[BLOCK + 2 :]
    _take_queries(q, q_stride, queries, width, q_ES)
    out_ES[:] = 0
    sums_2S[0], sums_2S[1] = UNSEEN, 0
    head = width * FLOAT
    q_at, block_at, scores_at = q_ES.ctypes.data, block_ES.ctypes.data, scores_KS.ctypes.data
    visible = seen + queries - 1
    for first in range(0, visible, BLOCK):
        keys, at = min(BLOCK, visible - first), first * head
        _sums(q_at, k + at, FLOAT, head, width, keys, scores_at)
        all_keys = _hide(scores_KS, keys, seen - first)
        weigh_tile(scores_at, all_keys, sums_2S.ctypes.data, scales_2S.ctypes.data)
        _sums(scores_at, v + at, head, FLOAT, keys, width, block_at)
        _merge(out_ES, block_ES, scales_2S)
    for s in range(queries):
        row_E, share = carray(floats_at(out + s * out_stride), (width,)), np.float32(1) / sums_2S[1, s]
        for e in range(width):
            row_E[e] = out_ES[e, s] * share


@cfunc(types.void(types.CPointer(types.int64)), cache=CACHE)
def _take_tasks(job: Any) -> None:
    """Runs in every thread.

    `job`: tasks taken; threads that have begun; T, H, G, E; keys before the rows' own; addresses of q, k, v, out and of
    the threads' scratch; bytes from a row of q and of out to the next.
    """
    rows, heads, groups, width, history = job[2], job[3], job[4], job[5], job[6]
    q_stride, out_stride = job[12], job[13]
    head = width * FLOAT
    room = 3 * width + BLOCK + 4
    scratch = carray(floats_at(job[11] + fetch_add(job, 1, 1) * room * SIDE * FLOAT), (room, SIDE))
    blocks = (rows + SIDE - 1) // SIDE
    task = fetch_add(job, 0, 1)
    while task < heads * blocks:
        h, first = task // blocks, (blocks - 1 - task % blocks) * SIDE  # the longest first, within a head
        kv = h // groups * (history + rows) * head
        _attend(
            job[7] + first * q_stride + h * head, q_stride, min(SIDE, rows - first), job[8] + kv, job[9] + kv,
            history + first + 1, width, scratch, job[10] + first * out_stride + h * head, out_stride,
        )  # fmt: skip
        task = fetch_add(job, 0, 1)


_TAKE_TASKS: int = _take_tasks.address


def attend_causally(q_THE: Tensor, k_KLE: Tensor, v_KLE: Tensor, out_THE: Tensor) -> None:
    """Writes the weighted values of the last T of a window's L positions, each of which sees itself and those before.

    All are float32 on the CPU. Keys and values are contiguous: a head's would crowd into few sets of a cache if they
    lay among other heads'. A row's heads lie one after the other.
    """
    rows, heads, width = q_THE.shape
    kv_heads, keys, _ = k_KLE.shape
    assert k_KLE.is_contiguous() and v_KLE.is_contiguous() and q_THE.stride(1) == out_THE.stride(1) == width
    scratch = torch.empty((torch.get_num_threads(), 3 * width + BLOCK + 4, SIDE))
    job = (
        0, 0, rows, heads, heads // kv_heads, width, keys - rows, q_THE.data_ptr(), k_KLE.data_ptr(), v_KLE.data_ptr(),
        out_THE.data_ptr(), scratch.data_ptr(), q_THE.stride(0) * FLOAT, out_THE.stride(0) * FLOAT,
    )  # fmt: skip
    openmp.run(_TAKE_TASKS, job, heads * -(-rows // SIDE))
