"""The same engine over two processes: attention in one, all routed experts in the other, gloo between them.

What Ray adds at run time is not on this way (no Ray call per step or layer), so the processes are plain ones.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from bench.local_engine import DecodeRun, LocalEngine, Shape
from dispatch.all_to_all import AllToAllDispatcher, ExpertRank
from dispatch.collective import CollectiveGate, Epoch
from dispatch.expert_map import ExpertMap
from dispatch.groups import EpochGroup, World
from dispatch.lockstep import Lockstep
from dispatch.store import connect_store, host_store
from llama4.config import TextConfig
from llama4.weights import Checkpoint, load_decoder, load_experts

ADDRESS = "127.0.0.1"
TIMEOUT_S = 300.0
WORLD = World(attention=(0,), slots=(0,))


@dataclass(frozen=True, slots=True)
class Work:
    """Decode runs to make: each batch size, from `context` tokens on, for `steps` steps."""

    batches: tuple[int, ...]
    context: int
    steps: int


@dataclass(frozen=True, slots=True)
class Roles:
    """torch threads of each process, and OMP_WAIT_POLICY (passive: idle OpenMP threads sleep at once)."""

    attention_threads: int
    expert_threads: int
    omp_wait: str | None = None


def measure(path: Path, shape: Shape, work: Work, roles: Roles) -> list[DecodeRun]:
    """One run for each batch size."""
    store, port = host_store(ADDRESS)
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    before = os.environ.get("OMP_WAIT_POLICY")
    if roles.omp_wait is not None:
        os.environ["OMP_WAIT_POLICY"] = roles.omp_wait  # read by OpenMP when the children load it
    try:
        processes = [
            context.Process(target=_attention, args=(theirs, path, port, shape, work, roles.attention_threads)),
            context.Process(target=_expert, args=(path, port, roles.expert_threads)),
        ]
        for process in processes:
            process.daemon = True
            process.start()
    finally:
        if roles.omp_wait is not None:
            os.environ.pop("OMP_WAIT_POLICY")
            if before is not None:
                os.environ["OMP_WAIT_POLICY"] = before
    theirs.close()
    try:
        runs: list[DecodeRun] = ours.recv()  # EOFError: the child has said why on its own stderr
    finally:
        for process in processes:
            process.join(10)
            process.kill()
        del store
    return runs


def _everywhere(config: TextConfig) -> ExpertMap:
    return ExpertMap(1, dict.fromkeys(config.moe_layers, ((0,),) * config.num_local_experts))


def _join(rank: int, port: int) -> EpochGroup:
    store = connect_store(ADDRESS, port, TIMEOUT_S)
    return EpochGroup.form(1, WORLD, rank, store, address=ADDRESS, timeout_s=TIMEOUT_S)


def _attention(pipe: Connection, path: Path, port: int, shape: Shape, work: Work, threads: int) -> None:
    torch.set_num_threads(threads)
    config = TextConfig.from_dir(path)
    decoder = load_decoder(Checkpoint(path), config, torch.float32, "cpu")
    gate = CollectiveGate(lambda epoch: _join(0, port), print)
    gate.adopt(Epoch(_everywhere(config), WORLD, ADDRESS, port))
    engine = LocalEngine(config, decoder, gate, gate, shape)
    engine.watch.time(AllToAllDispatcher, "dispatch", "dispatch")
    engine.watch.time(AllToAllDispatcher, "combine", "combine")
    runs: Sequence[DecodeRun] = [engine.decode(batch, work.context, work.steps) for batch in work.batches]
    pipe.send(list(runs))
    engine.close()


def _expert(path: Path, port: int, threads: int) -> None:
    """As actors.expert serves."""
    torch.set_num_threads(threads)
    config = TextConfig.from_dir(path)
    expert_map = _everywhere(config)
    experts = load_experts(Checkpoint(path), config, expert_map.experts_of(0), torch.float32, "cpu")
    group = _join(1, port)
    lockstep = Lockstep(group)
    rank = ExpertRank(group, expert_map, 0, experts, config.hidden_size, torch.float32)
    while not (header := lockstep.begin(0)).leaving:
        if header.idle:
            lockstep.wait()
        else:
            rank.serve_step()
    group.close()
