"""The same engine over two processes: attention in one, all routed experts in the other, gloo or sockets between them.

What Ray adds at run time is not on this way (no Ray call per step or layer), so the processes are plain ones.

Shapes: N rows, K experts per row, D model width.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from bench.common import apart
from bench.local_engine import DecodeRun, LocalEngine, Shape
from cluster.ray_environment import SHARED_CORES
from dispatch.all_to_all import ExpertRank
from dispatch.collective import CollectiveGate
from dispatch.epoch import Epoch, World
from dispatch.expert_map import ExpertMap
from dispatch.expert_server import ExpertServer
from dispatch.groups import EpochGroup
from dispatch.lockstep import Lockstep
from dispatch.p2p import P2PDispatcher
from dispatch.p2p_gate import P2PGate
from dispatch.store import connect_store, host_store
from dispatch.topology import SlotAddress, Topology
from engine.engine import StepGate
from llama4.config import TextConfig
from llama4.moe import Dispatcher, Experts, Ticket
from llama4.openmp import bind_threads
from llama4.weights import Checkpoint, load_decoder, load_experts

ADDRESS = "127.0.0.1"
TIMEOUT_S = 300.0
WORLD = World(attention=(0,), slots=(0,))
SECRET = b"of a measurement"
Transport: TypeAlias = Literal["p2p", "gloo"]
_SPAWN = get_context("spawn")


@dataclass(frozen=True, slots=True)
class Roles:
    """torch threads of each process."""

    attention_threads: int
    expert_threads: int


class _Watched:
    """A dispatcher, and the seconds in dispatch, in combine, and `hidden`: between the two, when others compute."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._sent_at = 0.0
        self.totals: dict[str, float] = {"dispatch": 0.0, "combine": 0.0, "hidden": 0.0}

    def dispatch(self, x_ND: Tensor, expert_ids_NK: Tensor, layer: int) -> Ticket:
        start = time.perf_counter()
        ticket = self._dispatcher.dispatch(x_ND, expert_ids_NK, layer)
        self._sent_at = time.perf_counter()
        self.totals["dispatch"] += self._sent_at - start
        return ticket

    def combine(self, ticket: Ticket) -> Tensor:
        start = time.perf_counter()
        self.totals["hidden"] += start - self._sent_at
        y_NKD = self._dispatcher.combine(ticket)
        self.totals["combine"] += time.perf_counter() - start
        return y_NKD

    def take_lost(self, num_tokens: int) -> frozenset[int]:
        return self._dispatcher.take_lost(num_tokens)


def hidden_share(run: DecodeRun) -> float:
    """The part of the time from the rows' departure to their results that the shared expert was computed in, 0 to 1.

    What the results may have waited for their combine counts as hidden.
    """
    return run.parts["hidden"] / (run.parts["hidden"] + run.parts["combine"])


class DistributedEngine:
    """The two processes; `close` ends them. The parts of a run have `dispatch`, `combine` and `hidden`, see above."""

    def __init__(self, path: Path, shape: Shape, roles: Roles, transport: Transport) -> None:
        self._store, port = host_store(ADDRESS)  # gloo's meeting place
        self._attention, theirs = _SPAWN.Pipe()
        self._experts, experts_end = _SPAWN.Pipe()
        self._processes = [
            _SPAWN.Process(target=_attention, args=(theirs, path, port, shape, roles, transport), daemon=True),
            _SPAWN.Process(
                target=_expert, args=(experts_end, path, port, roles.expert_threads, transport), daemon=True
            ),
        ]
        with _environment(roles):
            for process in self._processes:
                process.start()
        theirs.close()
        experts_end.close()
        if transport == "p2p":
            self._attention.send(self._experts.recv())

    def decode(self, batch: int, context: int, steps: int) -> DecodeRun:
        """As `LocalEngine.decode`. Raises EOFError if a process has ended; it has said why on its own stderr."""
        self._attention.send((batch, context, steps))
        run: DecodeRun = self._attention.recv()
        return run

    def close(self) -> None:
        self._attention.close()
        self._experts.close()
        for process in self._processes:
            process.join(10)
            process.kill()


@contextlib.contextmanager
def _environment(roles: Roles) -> Iterator[None]:
    """For children, as a deployment's actors on one machine have it: OpenMP reads it when it is loaded."""
    before = dict(os.environ)
    if roles.attention_threads + roles.expert_threads > (os.cpu_count() or 1):
        os.environ.update(SHARED_CORES | before)
    try:
        yield
    finally:
        for key in os.environ.keys() - before.keys():
            del os.environ[key]


def _everywhere(config: TextConfig) -> ExpertMap:
    return ExpertMap(1, dict.fromkeys(config.moe_layers, ((0,),) * config.num_local_experts))


def _join(rank: int, port: int) -> EpochGroup:
    store = connect_store(ADDRESS, port, TIMEOUT_S)
    return EpochGroup.form(1, WORLD, rank, store, address=ADDRESS, timeout_s=TIMEOUT_S)


def _attention(pipe: Connection, path: Path, port: int, shape: Shape, roles: Roles, transport: Transport) -> None:
    """Decodes as it is asked to, until the pipe's other end goes."""
    torch.set_num_threads(roles.attention_threads)
    config = TextConfig.from_dir(path)
    decoder = apart(lambda: load_decoder(Checkpoint(path), config, torch.float32, "cpu"))
    dispatcher, gate = _p2p(config, pipe.recv()) if transport == "p2p" else _gloo(config, port)
    watched = _Watched(dispatcher)
    engine = LocalEngine(config, decoder, watched, gate, shape)
    engine.watch.totals.update(watched.totals)
    watched.totals = engine.watch.totals
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(engine.decode(*pipe.recv()))
    engine.close()


def _p2p(config: TextConfig, address: SlotAddress) -> tuple[Dispatcher, StepGate]:
    dispatcher = P2PDispatcher(0, TIMEOUT_S, on_lost=print)
    gate = P2PGate(dispatcher, config.hidden_size, torch.float32)
    gate.adopt(Topology(_everywhere(config), {0: address}, SECRET))
    gate.wait()  # it is ready, and the engine's first begin() installs it
    return dispatcher, gate


def _gloo(config: TextConfig, port: int) -> tuple[Dispatcher, StepGate]:
    gate = CollectiveGate(lambda epoch: _join(0, port), print)
    gate.adopt(Epoch(_everywhere(config), WORLD, ADDRESS, port))
    return gate, gate


def _expert(pipe: Connection, path: Path, port: int, threads: int, transport: Transport) -> None:
    """As actors.expert serves; with p2p until the pipe's other end goes."""
    torch.set_num_threads(threads)
    config = TextConfig.from_dir(path)
    expert_map = _everywhere(config)
    experts = load_experts(Checkpoint(path), config, expert_map.experts_of(0), torch.float32, "cpu")
    bind_threads(0)  # before a group is formed, as in an expert actor
    if transport == "p2p":
        _serve_p2p(pipe, experts, config.hidden_size, expert_map)
    else:
        _serve_gloo(_join(1, port), experts, config.hidden_size, expert_map)


def _serve_p2p(pipe: Connection, experts: Experts, width: int, expert_map: ExpertMap) -> None:
    server = ExpertServer(experts, 0, width, torch.float32, SECRET, ADDRESS)
    server.allow(expert_map.experts_of(0), min_epoch=0)
    pipe.send(server.address)
    threading.Thread(target=_stop_at_end, args=(pipe, server), daemon=True).start()
    server.run()


def _stop_at_end(pipe: Connection, server: ExpertServer) -> None:
    with contextlib.suppress(EOFError):
        pipe.recv()
    server.stop()


def _serve_gloo(group: EpochGroup, experts: Experts, width: int, expert_map: ExpertMap) -> None:
    lockstep = Lockstep(group)
    rank = ExpertRank(group, expert_map, 0, experts, width, torch.float32)
    while not (header := lockstep.begin(0)).leaving:
        if header.idle:
            lockstep.wait()
        else:
            rank.serve_step()
    group.close()
