"""From epoch to epoch inside living processes: a slot dies, others go on; a new one joins; members leave in order."""

import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest
import torch

from dispatch.collective import CollectiveGate, CollectiveServer
from dispatch.epoch import Epoch, GroupBroken, World
from dispatch.groups import EpochGroup
from dispatch.local import LocalDispatcher
from tests.dispatch.members import LAYERS, NUM_EXPERTS, WIDTH, Case, RowwiseExperts, connect, form, make_batch, make_map
from tests.dispatch.pool import start_process

pytestmark = pytest.mark.cluster

CASE = Case(top_k=2, pattern="random")


def slot_process(pipe: Connection, slot: int) -> None:
    """Serves what it is called to; a None ends it."""
    torch.set_num_threads(1)

    def form_slot(epoch: Epoch) -> EpochGroup:
        return form(epoch.world.slot_rank(slot), epoch.world, epoch.expert_map.epoch, epoch.store_port)

    server = CollectiveServer(slot, RowwiseExperts(), WIDTH, torch.float32, form_slot, lambda reason: None)
    thread = threading.Thread(target=server.run)
    thread.start()
    while (epoch := pipe.recv()) is not None:
        server.adopt(epoch).result(30)
        pipe.send(epoch.expert_map.epoch)
    server.close()
    thread.join(30)
    pipe.send(not thread.is_alive())


class Attention:
    """An attention member in this process; every step is compared with the oracle."""

    def __init__(self) -> None:
        self.broken: list[str] = []
        self.gate = CollectiveGate(self._form, self.broken.append)
        self.rows = 1
        self.steps = 0
        self.wrong = 0
        self.stepped = threading.Condition()
        self._oracle = LocalDispatcher(RowwiseExperts(), NUM_EXPERTS)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _form(self, epoch: Epoch) -> EpochGroup:
        rank = epoch.world.attention_rank(0)
        return form(rank, epoch.world, epoch.expert_map.epoch, epoch.store_port)

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                try:
                    answer = self.gate.begin(self.rows, leaving=False)
                    if answer.leaving:
                        return
                    if answer.idle:
                        self.gate.wait()
                    else:
                        self._step()
                except GroupBroken as error:
                    self.gate.recover(error)

    def _step(self) -> None:
        for layer in LAYERS:
            x_TD, ids_TK = make_batch(CASE, 0, self.steps % 7, layer)
            y_TKD = self.gate.combine(self.gate.dispatch(x_TD, ids_TK, layer))
            self.wrong += not torch.equal(y_TKD, self._oracle.combine(self._oracle.dispatch(x_TD, ids_TK, layer)))
        with self.stepped:
            self.steps += 1
            self.stepped.notify_all()

    def go_on(self, steps: int) -> None:
        """Returns after so many further steps."""
        with self.stepped:
            goal = self.steps + steps
            assert self.stepped.wait_for(lambda: self.steps >= goal, 30)

    def end(self) -> bool:
        self.gate.close()
        self._thread.join(30)
        return not self._thread.is_alive()


@pytest.fixture
def attention(port: int) -> Iterator[Attention]:
    connect(port)
    member = Attention()
    yield member
    assert member.end()


def call(attention: Attention, slots: dict[int, Connection], epoch: int, port: int) -> None:
    view = Epoch(make_map(epoch, tuple(slots), copies=2), World((0,), tuple(slots)), "127.0.0.1", port)
    mine = attention.gate.adopt(view)
    for pipe in slots.values():
        pipe.send(view)
    for pipe in slots.values():
        assert pipe.poll(30) and pipe.recv() == epoch
    mine.result(30)


def test_a_death_a_successor_and_an_orderly_end(attention, port, epoch):
    processes = {slot: start_process(slot_process, slot) for slot in (2, 5)}
    pipes = {slot: pipe for slot, (_, pipe) in processes.items()}
    try:
        call(attention, pipes, epoch, port)
        attention.go_on(20)
        processes[5][0].kill()
        while not attention.broken:
            attention.stepped.acquire()
            attention.stepped.wait(0.01)
            attention.stepped.release()
        call(attention, {2: pipes[2]}, epoch + 1, port)  # every expert has a copy there
        attention.go_on(20)
        processes[5] = start_process(slot_process, 5)
        pipes[5] = processes[5][1]
        call(attention, pipes, epoch + 2, port)  # nobody's group broke: all leave it at the same step
        attention.go_on(20)
        assert len(attention.broken) == 1 and attention.wrong == 0
        attention.rows = 0  # idle members hear a call as well
        call(attention, pipes, epoch + 3, port)
        attention.rows = 1
        attention.gate.ring()
        attention.go_on(5)
        assert attention.end()
        for pipe in pipes.values():
            pipe.send(None)
            assert pipe.poll(30) and pipe.recv()
    finally:
        for process, _ in processes.values():
            process.kill()
            process.join()


def test_a_later_call_overtakes_an_earlier_one(port, epoch):
    gate = CollectiveGate(lambda view: form(0, view.world, view.expert_map.epoch, view.store_port), lambda reason: None)
    views = [Epoch(make_map(epoch + n, (2,), 1), World((0,), (2,)), "127.0.0.1", port) for n in range(2)]
    first, second = (gate.adopt(view) for view in views)
    assert first.cancelled() and not second.done()
    gate.close()
    assert second.cancelled()
    assert gate.begin(3, leaving=False).leaving
