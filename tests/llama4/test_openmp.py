"""Threads bound to CPUs."""

import os
import threading

import pytest

from llama4.openmp import bind_threads

CPUS = sorted(os.sched_getaffinity(0))[:2]
pytestmark = [
    pytest.mark.usefixtures("two_threads"),
    pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs"),
]


def where_bound(first: int, cpus: list[int]) -> tuple[set[int], list[set[int]]]:
    """The CPUs of a thread that may use `cpus` and binds itself, and those of the threads that this has started."""
    found: list[tuple[set[int], list[set[int]]]] = []
    done = threading.Event()

    def bind() -> None:
        os.sched_setaffinity(0, cpus)
        before = set(os.listdir("/proc/self/task"))
        bind_threads(first)
        started = sorted(set(os.listdir("/proc/self/task")) - before)
        found.append((os.sched_getaffinity(0), [os.sched_getaffinity(int(thread)) for thread in started]))
        done.set()

    # A thread of its own has OpenMP threads of its own, and leaves those of the test run as they are.
    threading.Thread(target=bind, daemon=True).start()
    assert done.wait(20)
    return found[0]


@pytest.mark.parametrize(("first", "own"), [(0, 0), (1, 1), (-1, 1), (2, 0)])
def test_each_thread_has_a_cpu_from_a_place_on(first: int, own: int) -> None:
    assert where_bound(first, CPUS) == ({CPUS[own]}, [{CPUS[1 - own]}])


def test_threads_stay_free_where_cpus_are_not_as_many() -> None:
    assert where_bound(0, CPUS[:1]) == ({CPUS[0]}, [])
