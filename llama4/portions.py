"""Work in numbered portions, shared out to threads: each takes those of its own share first, one after the other.

What a thread fetches ahead at a portion's end is then what it needs next, and it reads weights as one long stream; when
they take turns instead, the other one's caches have it: 3 to 7% more time for all products. A thread whose share is
done helps the others with theirs, so that a busy core still holds up nobody.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from numba import njit

from llama4 import openmp
from llama4.intrinsics import CACHE, fetch_add

_HEADER = 3
_ROWS = 16  # that a thread takes at a time
_SMALL = 1 << 15  # floats; below, a second thread costs more than it saves


@njit(cache=CACHE)
def room_for_shares(threads: Any) -> Any:
    """Numbers of a job that `share_out` needs."""
    return _HEADER + threads


@njit(cache=CACHE)
def share_out(job: Any, portions: Any, threads: Any) -> Any:
    """Begins a job: threads that have begun, threads, portions; the next portion of each thread's share.

    Returns where it goes on.
    """
    job[0], job[1], job[2] = 0, threads, portions
    for thread in range(threads):
        job[_HEADER + thread] = portions * thread // threads
    return room_for_shares(threads)


@njit(cache=CACHE)
def after_shares(job: Any) -> Any:
    """Where a job goes on that `share_out` has begun."""
    return room_for_shares(job[1])


@njit(cache=CACHE)
def begin(job: Any) -> Any:
    """This thread's number, for `take`; each thread asks once."""
    return fetch_add(job, 0, 1)


@njit  # not kept by itself: numba cannot use a generator that comes from its cache (0.68: KeyError)
def take(job: Any, thread: Any) -> Iterator[Any]:
    """The numbers of the portions that this thread has to do; no other thread gets them."""
    threads, portions = job[1], job[2]
    for turn in range(threads):
        share = (thread + turn) % threads
        stop = portions * (share + 1) // threads
        portion = fetch_add(job, _HEADER + share, 1)
        while portion < stop:
            yield portion
            portion = fetch_add(job, _HEADER + share, 1)


def run_rows(function: int, rows: int, about: Sequence[int], floats: int) -> None:
    """Runs the cfunc at this address in as many threads as so many floats are worth; they share rows by `take_rows`.

    Its job: portions taken; rows; `about`.
    """
    openmp.run(function, (0, rows, *about), 1 if floats < _SMALL else -(-rows // _ROWS))


@njit  # as `take`
def take_rows(job: Any) -> Iterator[Any]:
    """The rows that this thread has to do; no other thread gets them."""
    first = _ROWS * fetch_add(job, 0, 1)
    while first < job[1]:
        for row in range(first, min(first + _ROWS, job[1])):  # noqa: UP028 - numba has no `yield from`
            yield row
        first = _ROWS * fetch_add(job, 0, 1)
