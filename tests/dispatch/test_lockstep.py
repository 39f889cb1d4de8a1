import os
import random
import signal
import threading
import time

import pytest

from dispatch.epoch import GroupBroken, StaleEpoch
from dispatch.lockstep import Lockstep, StepHeader
from dispatch.store import host_store
from tests.dispatch.members import connect, form, make_world
from tests.dispatch.pool import start_process

pytestmark = pytest.mark.cluster


def test_header_properties():
    assert StepHeader(0, (0, 0), leaving=False).idle
    assert not StepHeader(0, (0, 0), leaving=True).idle
    assert not StepHeader(0, (0, 2), leaving=False).idle
    assert StepHeader(0, (1, 2), leaving=False).rows_total == 3


def _headers(rank, world, epoch, port):
    group = form(rank, world, epoch, port)
    lockstep = Lockstep(group)
    headers = [lockstep.begin(rank), lockstep.begin(5 * rank), lockstep.begin(1, leaving=rank == 2)]
    group.close()
    return headers


def test_all_see_the_same_headers(pool, port, epoch):
    for headers in pool.run(4, _headers, make_world(2, 2), epoch, port):
        assert headers == [
            StepHeader(0, (0, 1, 2, 3), leaving=False),
            StepHeader(1, (0, 5, 10, 15), leaving=False),
            StepHeader(2, (1, 1, 1, 1), leaving=True),
        ]


def _idle(rank, world, epoch, port):
    group = form(rank, world, epoch, port)
    lockstep = Lockstep(group)
    assert lockstep.begin(0).idle
    work: list[int] = []

    def arrive():
        work.append(3)
        lockstep.ring()

    if rank == 1:
        threading.Timer(2.0, arrive).start()
    start, cpu = time.monotonic(), time.process_time()
    lockstep.wait()
    idle_s, cpu_s = time.monotonic() - start, time.process_time() - cpu
    header = lockstep.begin(sum(work))
    lockstep.ring()  # busy: harmless
    leaving = lockstep.begin(0, leaving=rank == 3)
    group.close()
    return idle_s, cpu_s, header.rows, leaving.leaving


def test_idle_costs_no_cpu_and_any_member_wakes_all(pool, port, epoch):
    for idle_s, cpu_s, rows, leaving in pool.run(4, _idle, make_world(2, 2), epoch, port):
        assert idle_s > 1.5
        assert cpu_s < 0.01 * idle_s
        assert rows == (0, 3, 0, 0)
        assert leaving


def _hammer(rank, world, epoch, port, items):
    """Producers on threads of their own drop single items at random moments; every item must be stepped."""
    store = connect(port).meeting
    group = form(rank, world, epoch, port)
    lockstep = Lockstep(group)
    lockstep.begin(1)  # all are here
    keys = store.num_keys()
    lockstep.begin(1)
    inbox: list[int] = []
    dice = random.Random(100 * epoch + rank)

    def produce():
        for item in range(items):
            if dice.random() < 0.7:
                time.sleep(dice.random() * 0.01)
            inbox.append(item)
            lockstep.ring()

    producer = threading.Thread(target=produce, daemon=True)
    if rank < len(world.attention):
        producer.start()
    stepped = idles = 0
    while stepped < items * len(world.attention):
        rows = len(inbox)
        del inbox[:rows]
        header = lockstep.begin(rows)
        stepped += header.rows_total
        if header.idle:
            idles += 1
            lockstep.wait()
    if producer.ident is not None:
        producer.join()
    lockstep.begin(1)  # old keys are gone now
    left = store.num_keys() - keys
    lockstep.begin(1)
    group.close()
    return stepped, idles, left


def test_no_wake_up_is_lost_and_keys_do_not_pile_up(pool, port, epoch):
    results = pool.run(4, _hammer, make_world(3, 1), epoch, port, 150)
    assert {stepped for stepped, _, _ in results} == {450}
    assert len({idles for _, idles, _ in results}) == 1
    assert results[0][1] > 20, "the hammer must meet idle groups"
    assert all(left <= 1 for _, _, left in results)


def _ring_before_wait(rank, world, epoch, port):
    group = form(rank, world, epoch, port)
    lockstep = Lockstep(group)
    for turn in range(20):  # one of the two rings: before begin(), or between begin() and wait(), alone or late
        rings = turn % 2 == rank
        if rings and turn % 8 < 4:
            lockstep.ring()
        assert lockstep.begin(0).idle
        if rings and turn % 8 >= 4:
            lockstep.ring()
            lockstep.ring()
        elif turn % 4 < 2:
            time.sleep(0.01)
        lockstep.wait()
    group.close()


def test_a_ring_before_wait_is_kept(pool, port, epoch):
    pool.run(2, _ring_before_wait, make_world(1, 1), epoch, port)


def _out_of_step(rank, world, epoch, port):
    group = form(rank, world, epoch, port)
    lockstep = Lockstep(group)
    lockstep.begin(1)
    if rank == 1:
        lockstep._step += 1
    with pytest.raises(StaleEpoch) as raised:
        lockstep.begin(1)
    group.close()
    return str(raised.value)


def test_members_at_different_steps(pool, port, epoch):
    first, second, _ = pool.run(3, _out_of_step, make_world(1, 2), epoch, port)
    assert first == f"epoch {epoch}: group broken while beginning step 1: slot 0 is at epoch {epoch} step 2"
    assert second == f"epoch {epoch}: group broken while beginning step 2: attention 0 is at epoch {epoch} step 1"


def _dies_while_idle(rank, world, epoch, port):
    group = form(rank, world, epoch, port)
    lockstep = Lockstep(group)
    assert lockstep.begin(0).idle
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 0:
        time.sleep(0.3)
        lockstep.ring()
    lockstep.wait()
    start = time.monotonic()
    with pytest.raises(GroupBroken):
        lockstep.begin(0)
    group.close()
    return time.monotonic() - start


def test_a_member_that_dies_while_all_are_idle(pool, port, epoch):
    *latencies, dead = pool.run(3, _dies_while_idle, make_world(1, 2), epoch, port)
    assert dead is None
    assert max(latencies) < 2


def _silent(rank, world, epoch, port):
    group = form(rank, world, epoch, port, timeout_s=1)
    if rank == 2:
        time.sleep(2)
    start = time.monotonic()
    with pytest.raises(GroupBroken):
        Lockstep(group).begin(0)
    group.close()
    return time.monotonic() - start


def test_a_member_that_goes_silent_is_given_up_at_the_timeout(pool, port, epoch):
    *others, _ = pool.run(3, _silent, make_world(1, 2), epoch, port)
    assert all(0.9 < seconds < 3 for seconds in others)


def _host_store(pipe):
    _store, port = host_store("127.0.0.1")
    pipe.send(port)
    pipe.recv()


def _store_dies(rank, world, epoch, port, pid):
    group = form(rank, world, epoch, port)
    lockstep = Lockstep(group)
    assert lockstep.begin(0).idle
    if rank == 0:
        threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
    start = time.monotonic()
    with pytest.raises(GroupBroken, match="waiting for work"):
        lockstep.wait()
    with pytest.raises(GroupBroken, match="ringing"):
        lockstep.ring()
    group.close()
    return time.monotonic() - start


def test_a_store_that_dies_ends_the_waiting(pool, epoch):
    process, pipe = start_process(_host_store)
    try:
        assert max(pool.run(3, _store_dies, make_world(1, 2), epoch, pipe.recv(), process.pid)) < 3
    finally:
        process.kill()
        process.join()
