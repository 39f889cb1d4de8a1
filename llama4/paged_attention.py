"""Attention of single rows over KV pages, on CPUs in float32: keys and values are read where they lie, once.

Nothing is gathered, padded or masked. A row's keys are cut into stretches; each stretch is a task for whoever is free,
and attends with all heads, page by page, so that memory is read nearly in order. The stretches' softmax sums are merged
by whoever ends a row's last one (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).

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
from llama4.intrinsics import CACHE, fetch_add, float_of_bits, floats_at, ints_at, prefetch
from llama4.kv_pages import KVPages, Window
from llama4.tiles import FLOAT, add_weighted_sums, dots

STRETCH = 256  # keys of a task, rounded up to whole pages
_KEYS, _VALUES = 6, 8  # that are computed at a time
_TASK = 6  # numbers of a task
_INT = 8  # bytes
_LINE = 64  # bytes of a cache line
_COUNTERS = 16  # where a job's counters of ended stretches start, one for each task that is a row's first


@njit(fastmath=True, cache=CACHE)
def _exp(x: Any) -> Any:
    """exp(x) for x <= 0, to two units in the last place: 2^n times a Taylor polynomial of what is left over.

    Branch-free, so that LLVM turns loops over it into vectors, which it does not with the library's function.
    """
    x = max(x, np.float32(-87.0))
    n = np.int32(x * np.float32(1.4426950408889634) - np.float32(0.5))
    r = x - np.float32(n) * np.float32(0.693359375) + np.float32(n) * np.float32(2.1219444e-4)
    series = np.float32(1 / 720)
    for factor in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        series = series * r + np.float32(factor)
    return series * float_of_bits((n + np.int32(127)) << np.int32(23))


@njit(fastmath=True, cache=CACHE)
def _softmax(scores: Any, keys: Any, scale: Any) -> Any:
    """Turns a head's scores into exp(scale * (score - largest)); returns the scaled largest and their sum."""
    p = carray(floats_at(scores), (keys,))
    largest = p[0]
    for i in range(keys):
        largest = max(largest, p[i])
    total = np.float32(0)
    for i in range(keys):
        p[i] = _exp(scale * (p[i] - largest))
        total += p[i]
    return scale * largest, total


@njit(fastmath=True, cache=CACHE)
def _merge(sums: Any, out: Any, stretches: Any, heads: Any, width: Any) -> None:
    """out[head] = the weighted values of all stretches. sums[stretch, head]: values, largest score, sum of weights."""
    sums_SHV = carray(floats_at(sums), (stretches, heads, width + 2))
    out_HE = carray(floats_at(out), (heads, width))
    for h in range(heads):
        largest = sums_SHV[0, h, width]
        for s in range(stretches):
            largest = max(largest, sums_SHV[s, h, width])
        total = np.float32(0)
        for s in range(stretches):
            total += _exp(sums_SHV[s, h, width] - largest) * sums_SHV[s, h, width + 1]
        for e in range(width):
            out_HE[h, e] = 0
        for s in range(stretches):
            weight = _exp(sums_SHV[s, h, width] - largest) / total
            for e in range(width):
                out_HE[h, e] += weight * sums_SHV[s, h, e]


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
    scores: Any, scores_stride: Any, sums: Any,
) -> None:  # fmt: skip
    """One stretch: `keys` keys from place `first` of the first page on. For sums[head], see `_merge`."""
    head, sum_stride = width * FLOAT, (width + 2) * FLOAT
    token = 2 * kv_heads * head
    used_pages = (first + keys + page_size - 1) // page_size
    place, done = first, 0
    for page in range(used_pages):
        kv, next_kv = pool + (pages[page] * page_size + place) * token, pool + pages[page + 1] * page_size * token
        count = min(page_size - place, keys - done)
        for k in range(kv_heads):
            h = k * groups
            for i in range(0, count, _KEYS):
                some, at = min(_KEYS, count - i), k * head + i * token
                _fetch(next_kv + at, some, token, head)
                out = scores + h * scores_stride + (done + i) * FLOAT
                dots(groups, q + h * head, head, some, kv + at, token, out, scores_stride, width)
        place, done = 0, done + count
    sums_HV = carray(floats_at(sums), (kv_heads * groups, width + 2))
    sums_HV[:] = 0
    scale = np.float32(1 / np.sqrt(width))
    for h in range(kv_heads * groups):
        sums_HV[h, width], sums_HV[h, width + 1] = _softmax(scores + h * scores_stride, keys, scale)
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
    page size, K, G, E; q's address and its rows' stride in floats; addresses of out and of the threads' scores; keys
    that a head's scores have room for; address of the tasks' sums; from _COUNTERS on, each row's ended stretches.
    """
    tasks, pool, page_size, kv_heads, groups, width = ints_at(job[3]), job[5], job[6], job[7], job[8], job[9]
    heads, scores_stride = kv_heads * groups, job[14] * FLOAT
    scores = job[13] + fetch_add(job, 1, 1) * heads * scores_stride
    sums_size = heads * (width + 2) * FLOAT
    task = fetch_add(job, 0, 1)
    while task < job[2]:
        at = task * _TASK
        row, page, first, keys = tasks[at], tasks[at + 1], tasks[at + 2], tasks[at + 3]
        stretches, first_task = tasks[at + 4], tasks[at + 5]
        q, pages, sums = job[10] + row * job[11] * FLOAT, ints_at(job[4] + page * _INT), job[15] + task * sums_size
        _attend(q, pool, pages, first, keys, page_size, kv_heads, groups, width, scores, scores_stride, sums)
        if fetch_add(job, _COUNTERS + first_task, 1) == stretches - 1:
            out = job[12] + row * heads * width * FLOAT
            _merge(job[15] + first_task * sums_size, out, stretches, heads, width)
        task = fetch_add(job, 0, 1)


_TAKE_TASKS: int = _take_tasks.address


@dataclass(frozen=True, slots=True)
class PagedDecode:
    """The single rows of a step for the layers of one kind.

    `tasks_N6`: row; place in `pages_P` of its first page; place of its first key in that page; keys; stretches of the
    row; the task of the row's first stretch. A row's stretches are consecutive tasks. Behind the last page that is used
    `pages_P` has another, which is only fetched ahead.
    """

    tasks_N6: NDArray[np.int64]
    pages_P: NDArray[np.int64]

    @classmethod
    def of(cls, windows: Sequence[Window], page_size: int) -> PagedDecode:
        """Cuts the rows' windows into stretches."""
        tasks: list[tuple[int, int, int, int, int, int]] = []
        pages: list[int] = []
        step = -(-STRETCH // page_size) * page_size
        for window in windows:
            end = window.first + window.keys
            stretches, first_task = -(-end // step), len(tasks)
            for start in range(0, end, step):
                first = window.first if start == 0 else 0
                keys = min(step, end - start) - first
                tasks.append((window.row, len(pages) + start // page_size, first, keys, stretches, first_task))
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
        keys = -(-STRETCH // page_size) * page_size
        scores = torch.empty((torch.get_num_threads(), heads, keys))
        sums = torch.empty((tasks, heads, head_dim + 2))
        job = (
            0, 0, tasks, self.tasks_N6.ctypes.data, self.pages_P.ctypes.data, pool.data_ptr(), page_size, kv_heads,
            heads // kv_heads, head_dim, q_THE.data_ptr(), q_THE.stride(0), out_THE.data_ptr(), scores.data_ptr(),
            keys, sums.data_ptr(), *([0] * tasks),
        )  # fmt: skip
        openmp.run(_TAKE_TASKS, job)
