"""Threads that give way: nicer than their process, but no thread that a busy machine leaves without any CPU."""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from actors.giving_way import giving_way

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="niceness is a thread's own on Linux")


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def of_a_thread_begun_here() -> tuple[int, int]:
    """Its niceness and its policy."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(lambda: (niceness(), os.sched_getscheduler(0))).result()


def test_work_is_nicer_than_who_waits_for_it():
    before = niceness()
    assert giving_way(niceness) == min(before + 10, 19)
    assert niceness() == before


def test_what_it_begins_gives_way_too():
    assert giving_way(of_a_thread_begun_here) == (min(niceness() + 10, 19), os.SCHED_OTHER)


def test_nobody_is_nicer_than_nineteen():
    assert giving_way(lambda: giving_way(lambda: giving_way(niceness))) == 19
