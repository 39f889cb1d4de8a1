"""Attention of single rows over KV pages, on CPUs in float32: keys and values are read where they lie, once.

Nothing is gathered, padded or masked. A row's keys are cut into the blocks of `prefill_attention`; each is a task for
whoever is free, and attends with all heads, page by page, so that memory is read nearly in order. The blocks' softmax
sums are merged in turn by whoever ends a row's last one (Milakov and Gimelshein, "Online normalizer calculation for
softmax", 2018). A row gets the same bits as beside others of its prompt.

Shapes: T rows of the step, N tasks, P pages, H query heads, K key/value heads, G = H / K, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from numpy.typing import NDArray
from torch import Tensor

from llama4 import openmp
from llama4.intrinsics import CACHE, UNSEEN, fetch_add, floats_at, ints_at, prefetch
from llama4.kv_pages import KVPages, Window
from llama4.prefill_attention import BLOCK
from llama4.softmax_tiles import KEYS, exp, score_tile, weigh
from llama4.tiles import FLOAT, add_weighted_sums

_VALUES = 8  # that are computed at a time
_ROOM = BLOCK + KEYS  # of a head's scores: the last tile may reach beyond them
_TASK = 6  # numbers of a task
_INT = 8  # bytes
_LINE = 64  # bytes of a cache line
_COUNTERS = 15  # where a job's counters of ended blocks start, one for each task that is a row's first


@njit(cache=CACHE)
def _merge(sums: Any, out: Any, blocks: Any, heads: Any, width: Any) -> None:
    """out[head] = the weighted values of all blocks. sums[block, head]: values, largest score, sum of weights."""
    sums_BHV = carray(floats_at(sums), (blocks, heads, width + 2))
    out_HE = carray(floats_at(out), (heads, width))
    for h in range(heads):
        out_E, top, total = out_HE[h], np.float32(UNSEEN), np.float32(0)
        out_E[:] = 0
        for b in range(blocks):
            block_V = sums_BHV[b, h]
            largest = max(top, block_V[width])
            old, new = exp(top - largest), exp(block_V[width] - largest)
            top, total = largest, total * old + block_V[width + 1] * new
            for e in range(width):
                out_E[e] = out_E[e] * old + block_V[e] * new
        share = np.float32(1) / total
        for e in range(width):
            out_E[e] *= share


@njit(cache=CACHE)
def _scores(
    queries: Any, q: Any, q_stride: Any, k: Any, k_stride: Any, some: Any, next_k: Any, width: Any, y: Any,
    y_stride: Any,
) -> None:  # fmt: skip
    """As `score_tile`, for any number of queries."""
    whole = queries - queries % 4
    for r in range(0, whole, 4):
        q_r, y_r = q + r * q_stride, y + r * y_stride
        score_tile(4, q_r, q_stride, k, k_stride, some, next_k, width, y_r, y_stride)
    q_r, y_r = q + whole * q_stride, y + whole * y_stride
    if queries % 4 == 3:
        score_tile(3, q_r, q_stride, k, k_stride, some, next_k, width, y_r, y_stride)
    elif queries % 4 == 2:
        score_tile(2, q_r, q_stride, k, k_stride, some, next_k, width, y_r, y_stride)
    elif queries % 4 == 1:
        score_tile(1, q_r, q_stride, k, k_stride, some, next_k, width, y_r, y_stride)


@njit(cache=CACHE)
def _fetch(rows: Any, count: Any, stride: Any, size: Any) -> None:
    """Begins to bring `count` rows of `size` bytes into the cache.

    A core keeps track of about twenty lines that are on their way and waits with any more, so only a few rows are
    fetched at a time, between computations: contexts beyond the cache are read an eighth faster than a page at a time.
    """
    for row in range(count):
        for line in range(0, size, _LINE):
            prefetch(rows + row * stride + line)


@njit(cache=CACHE)
def _attend(
    q: Any, pool: Any, pages: Any, first: Any, keys: Any, page_size: Any, kv_heads: Any, groups: Any, width: Any,
    scratch: Any, sums: Any,
) -> None:  # fmt: skip
    """One block: `keys` keys from place `first` of the first page on. For sums[head], see `_merge`."""
    heads, head, sum_stride, scores_stride = kv_heads * groups, width * FLOAT, (width + 2) * FLOAT, _ROOM * FLOAT
    scaled, scores = scratch, scratch + heads * head
    token = 2 * kv_heads * head
    q_N, scaled_N = carray(floats_at(q), (heads * width,)), carray(floats_at(scaled), (heads * width,))
    scale = np.float32(1 / np.sqrt(width))
    for n in range(heads * width):
        scaled_N[n] = scale * q_N[n]
    used_pages = (first + keys + page_size - 1) // page_size
    place, done = first, 0
    for page in range(used_pages):
        kv, next_kv = pool + (pages[page] * page_size + place) * token, pool + pages[page + 1] * page_size * token
        count = min(page_size - place, keys - done)
        for k in range(kv_heads):
            h = k * groups
            for i in range(0, count, KEYS):
                some, at, out = min(KEYS, count - i), k * head + i * token, scores + (done + i) * FLOAT
                _scores(
                    groups, scaled + h * head, head, kv + at, token, some, next_kv + at, width,
                    out + h * scores_stride, scores_stride,
                )  # fmt: skip
        place, done = 0, done + count
    carray(floats_at(sums), (heads * (width + 2),))[:] = 0
    for h in range(heads):
        weigh(scores + h * scores_stride, keys, sums + h * sum_stride + head)
    place, done = first, 0
    for page in range(used_pages):
        kv, next_kv = pool + (pages[page] * page_size + place) * token, pool + pages[page + 1] * page_size * token
        count = min(page_size - place, keys - done)
        for k in range(kv_heads):
            h = k * groups
            for i in range(0, count, _VALUES):
                some, at = min(_VALUES, count - i), (kv_heads + k) * head + i * token
                _fetch(next_kv + at, some, token, head)
                p, out = scores + h * scores_stride + (done + i) * FLOAT, sums + h * sum_stride
                add_weighted_sums(groups, p, scores_stride, some, kv + at, token, out, sum_stride, width)
        place, done = 0, done + count


@cfunc(types.void(types.CPointer(types.int64)), cache=CACHE)
def _take_tasks(job: Any) -> None:
    """Runs in every thread.

    `job`: tasks taken; threads that have begun; tasks; addresses of their numbers, of the page ids and of the pool;
    page size, K, G, E; q's address and its rows' stride in floats; addresses of out, of the threads' scratch and of the
    tasks' sums; from _COUNTERS on, each row's ended blocks.
    """
    tasks, pool, page_size, kv_heads, groups, width = ints_at(job[3]), job[5], job[6], job[7], job[8], job[9]
    heads = kv_heads * groups
    scratch = job[13] + fetch_add(job, 1, 1) * heads * (width + _ROOM) * FLOAT
    sums_size = heads * (width + 2) * FLOAT
    task = fetch_add(job, 0, 1)
    while task < job[2]:
        at = task * _TASK
        row, page, first, keys = tasks[at], tasks[at + 1], tasks[at + 2], tasks[at + 3]
        blocks, first_task = tasks[at + 4], tasks[at + 5]
        q, pages, sums = job[10] + row * job[11] * FLOAT, ints_at(job[4] + page * _INT), job[14] + task * sums_size
        _attend(q, pool, pages, first, keys, page_size, kv_heads, groups, width, scratch, sums)
        if fetch_add(job, _COUNTERS + first_task, 1) == blocks - 1:
            out = job[12] + row * heads * width * FLOAT
            _merge(job[14] + first_task * sums_size, out, blocks, heads, width)
        task = fetch_add(job, 0, 1)


_TAKE_TASKS: int = _take_tasks.address


@dataclass(frozen=True, slots=True)
class PagedDecode:
    """The single rows of a step for the layers of one kind.

    `tasks_N6`: row; place in `pages_P` of its first page; place of its first key in that page; keys; blocks of the row;
    the task of the row's first block. A row's blocks are consecutive tasks. Behind the last page that is used `pages_P`
    has another, which is only fetched ahead.
    """

    tasks_N6: NDArray[np.int64]
    pages_P: NDArray[np.int64]

    @classmethod
    def of(cls, windows: Sequence[Window], page_size: int) -> PagedDecode:
        """Cuts the rows' windows into blocks."""
        tasks: list[tuple[int, int, int, int, int, int]] = []
        pages: list[int] = []
        for window in windows:
            blocks, first_task = -(-window.keys // BLOCK), len(tasks)
            for start in range(0, window.keys, BLOCK):
                page, first = divmod(window.first + start, page_size)
                keys = min(BLOCK, window.keys - start)
                tasks.append((window.row, len(pages) + page, first, keys, blocks, first_task))
            pages += window.pages
        return cls(np.array(tasks, dtype=np.int64).reshape(-1, _TASK), np.array([*pages, 0], dtype=np.int64))

    def attend(self, layer: int, q_THE: Tensor, kv: KVPages, out_THE: Tensor) -> None:
        """Writes the weighted values of these rows."""
        tasks = len(self.tasks_N6)
        if not tasks:
            return
        pool = kv.pool(layer)
        _, page_size, _, kv_heads, head_dim = pool.shape
        _, heads, _ = q_THE.shape
        assert q_THE.stride(1) == head_dim and out_THE.is_contiguous()
        scratch = torch.empty((torch.get_num_threads(), heads, head_dim + _ROOM))
        sums = torch.empty((tasks, heads, head_dim + 2))
        job = (
            0, 0, tasks, self.tasks_N6.ctypes.data, self.pages_P.ctypes.data, pool.data_ptr(), page_size, kv_heads,
            heads // kv_heads, head_dim, q_THE.data_ptr(), q_THE.stride(0), out_THE.data_ptr(), scratch.data_ptr(),
            sums.data_ptr(), *([0] * tasks),
        )  # fmt: skip
        openmp.run(_TAKE_TASKS, job, tasks)
