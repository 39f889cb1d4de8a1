"""Expert servers on threads of this process or in processes of their own, and attention ranks that ask them."""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection as Pipe
from typing import Any

import torch

from dispatch.expert_map import ExpertMap
from dispatch.expert_server import ExpertServer
from dispatch.faults import Fault, Faults
from dispatch.gate import StepAnswer
from dispatch.p2p import P2PDispatcher
from dispatch.p2p_gate import P2PGate
from dispatch.routing import GroupedExperts
from dispatch.stats import ServerStats
from dispatch.topology import SlotAddress, Topology
from tests.dispatch.members import WIDTH, RowwiseExperts
from tests.dispatch.pool import start_process

# Names the sockets too, so each of pytest-xdist's workers needs its own; processes of a test inherit it.
SECRET = f"of the tests {os.environ.get('PYTEST_XDIST_WORKER', '')}".encode()
HOST = "127.0.0.1"
lanes_on: torch.device | None = None  # how rows travel in the tests that are under way


def use(way: str) -> None:
    """How rows travel from now on, see `way` in conftest.py."""
    global lanes_on
    lanes_on = torch.device("cpu") if way == "lanes" else None


class Attention:
    """One rank: dispatcher and gate, and the losses that it was told of."""

    def __init__(
        self,
        source: int,
        dtype: torch.dtype = torch.float32,
        width: int = WIDTH,
        deadline_s: float = 20,
        script: Sequence[Fault] = (),
        connect_timeout_s: float = 2,
    ) -> None:
        self.losses: list[tuple[int, str, str]] = []
        faults = Faults(script, "attention", source) if script else None
        self.dispatcher = P2PDispatcher(source, deadline_s, lambda *loss: self.losses.append(loss), faults)
        self.gate = P2PGate(self.dispatcher, width, dtype, connect_timeout_s, lanes_on)

    def adopt(self, topology: Topology) -> StepAnswer:
        """Returns when it is installed."""
        installed = self.gate.adopt(topology)
        while True:
            answer = self.gate.begin(0, leaving=False)
            if installed.done():
                return answer
            self.gate.wait()

    def close(self) -> None:
        self.gate.close()
        self.dispatcher.close()


class Servers:
    """Serves on threads, until the test ends."""

    def __init__(self) -> None:
        self.running: dict[int, tuple[ExpertServer, threading.Thread]] = {}

    def start(
        self,
        slot: int,
        expert_map: ExpertMap,
        experts: GroupedExperts | None = None,
        dtype: torch.dtype = torch.float32,
        width: int = WIDTH,
        script: Sequence[Fault] = (),
        **options: Any,
    ) -> SlotAddress:
        faults = Faults(script, "expert", slot) if script else None
        rows = width, dtype
        options |= {"faults": faults, "lanes_on": lanes_on}
        server = ExpertServer(experts or RowwiseExperts(), slot, *rows, SECRET, HOST, **options)
        server.allow(expert_map.experts_of(slot), min_epoch=0)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        self.running[slot] = server, thread
        return server.address

    def stop(self, slot: int) -> None:
        server, thread = self.running.pop(slot)
        server.stop()
        thread.join(10)
        assert not thread.is_alive()

    def __getitem__(self, slot: int) -> ExpertServer:
        return self.running[slot][0]

    def close(self) -> None:
        for slot in list(self.running):
            self.stop(slot)

    def counted(self) -> dict[int, ServerStats]:
        """What each has counted in its life, which ends with this: counting comes after the answer."""
        stats = {slot: server.stats for slot, (server, _) in self.running.items()}
        self.close()
        return stats


@contextmanager
def process(slot: int, expert_map: ExpertMap, script: Sequence[Fault] = ()) -> Iterator[tuple[int, SlotAddress]]:
    """A server in a process of its own, which can be killed or stopped: its pid and address."""
    child, pipe = start_process(_serve, slot, expert_map, tuple(script), lanes_on)
    try:
        assert pipe.poll(60), "the server has not started"
        yield child.pid, pipe.recv()
    finally:
        child.kill()
        child.join()


def _serve(
    pipe: Pipe, slot: int, expert_map: ExpertMap, script: Sequence[Fault], lanes_on: torch.device | None
) -> None:
    torch.set_num_threads(1)
    options: dict[str, Any] = {"faults": Faults(script, "expert", slot) if script else None, "lanes_on": lanes_on}
    server = ExpertServer(RowwiseExperts(), slot, WIDTH, torch.float32, SECRET, HOST, unix=False, **options)
    server.allow(expert_map.experts_of(slot), min_epoch=0)
    pipe.send(server.address)
    server.run()


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def settled() -> tuple[int, int]:
    """Open file descriptors and threads, once they stay the same: what has just been closed takes a while to end."""
    before, now = (0, 0), (open_fds(), threading.active_count())
    while now != before:
        time.sleep(0.5)
        before, now = now, (open_fds(), threading.active_count())
    return now
