from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numba import cfunc, types

from llama4 import openmp
from llama4.intrinsics import fetch_add, ints_at
from llama4.portions import after_shares, begin, room_for_shares, share_out, take
from llama4.row_products import threads_for

pytestmark = [
    pytest.mark.usefixtures("restored_threads"),
    pytest.mark.skipif(not openmp.available(), reason="torch has no OpenMP"),
]


@cfunc(types.void(types.CPointer(types.int64)))
def _write_down(job: Any) -> None:
    """`job`: the shares; room for portions; the address of a counter, and behind it of the portions in their order."""
    header = after_shares(job)
    room, log = job[header], ints_at(job[header + 1])
    for portion in take(job, begin(job)):
        place = fetch_add(log, 0, 1)
        if place < room:
            log[1 + place] = portion


def _taken(portions: int, expected: int, come: int, begun: int = 0) -> list[int]:
    """What `come` threads take, with shares for `expected`, if `begun` have begun before."""
    log = np.zeros(1 + portions, dtype=np.int64)
    job = np.empty(room_for_shares(expected) + 2, dtype=np.int64)
    at = share_out(job, portions, expected)
    job[at:] = portions, log.ctypes.data
    job[0] = begun
    torch.set_num_threads(come)
    openmp.run(_write_down.address, job.tolist(), portions=come)
    assert log[0] == portions
    return log[1:].tolist()


@given(st.integers(0, 200), st.integers(1, 9), st.integers(1, 4))
def test_every_portion_is_taken_once_even_if_fewer_threads_come_than_there_are_shares(
    portions: int, expected: int, come: int
) -> None:
    assert sorted(_taken(portions, expected, min(come, expected))) == list(range(portions))


def test_a_thread_takes_its_own_share_in_order_and_then_the_others() -> None:
    assert _taken(11, 3, come=1, begun=1) == [3, 4, 5, 6, 7, 8, 9, 10, 0, 1, 2]


@pytest.mark.parametrize(("portions", "threads"), [(1, 1), (2, 2), (3, 3), (40, 3)])
def test_no_thread_comes_for_which_there_is_no_portion(portions: int, threads: int) -> None:
    job = np.zeros(1, dtype=np.int64)
    torch.set_num_threads(3)
    openmp.run(_count.address, (job.ctypes.data,), portions)
    assert job[0] == threads
    assert threads_for(1 << 30, portions, 3) == threads
    assert threads_for(1, portions, 3) == 1


@cfunc(types.void(types.CPointer(types.int64)))
def _count(job: Any) -> None:
    fetch_add(ints_at(job[0]), 0, 1)
