"""What a dispatch+combine costs over sockets, against this machine's raw TCP round trip and against gloo's all-to-all.

Experts give back what they get, so that only the travel is timed. Every member is a process of its own. With more than
one attention rank all of them work at the same time, each for itself; the figure is the median over all their rounds.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection as Pipe
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from bench.common import Cell, JsonFile, Report, seconds
from bench.limits import tcp_round_trip
from dispatch.all_to_all import AllToAllDispatcher, ExpertRank
from dispatch.epoch import World
from dispatch.expert_map import ExpertMap
from dispatch.expert_server import ExpertServer
from dispatch.groups import EpochGroup
from dispatch.p2p import P2PDispatcher
from dispatch.p2p_gate import P2PGate
from dispatch.store import connect_store, host_store
from dispatch.topology import SlotAddress, Topology

WIDTH = 1024
NUM_EXPERTS = 16
LAYER = 0
HOST = "127.0.0.1"
SECRET = b"of a measurement"
_SPAWN = get_context("spawn")


@dataclass(frozen=True, slots=True)
class Case:
    """A world and a batch: `rows` rows of WIDTH float32 for each attention rank, top-1, experts at random."""

    attention: int
    slots: int
    rows: int
    rounds: int

    @property
    def expert_map(self) -> ExpertMap:
        return ExpertMap(1, {LAYER: tuple((expert % self.slots,) for expert in range(NUM_EXPERTS))})

    @property
    def bytes_each_way(self) -> int:
        return self.rows * WIDTH * 4

    def batch(self, rank: int) -> tuple[Tensor, Tensor]:
        """x_TD and expert_ids_T1."""
        generator = torch.Generator().manual_seed(rank)
        return (
            torch.randn(self.rows, WIDTH, generator=generator),
            torch.randint(NUM_EXPERTS, (self.rows, 1), generator=generator),
        )


def identity(layer: int, x_ND: Tensor, expert_ids: Sequence[int], counts: Sequence[int]) -> Tensor:
    return x_ND


def p2p_seconds(case: Case, unix: bool = True) -> list[float]:
    """Seconds of each round of every attention rank, over the p2p transport: Unix sockets or TCP."""
    with _Members() as members:
        servers = [members.start(_serve_p2p, slot, case, unix) for slot in range(case.slots)]
        addresses: dict[int, SlotAddress] = {slot: pipe.recv() for slot, pipe in enumerate(servers)}
        topology = Topology(case.expert_map, addresses, SECRET)
        return _times([members.start(_ask_p2p, rank, case, topology) for rank in range(case.attention)])


def gloo_seconds(case: Case) -> list[float]:
    """The same over the collective transport."""
    store, port = host_store(HOST)
    with _Members() as members:
        for rank in range(case.attention, case.attention + case.slots):
            members.start(_serve_gloo, rank, case, port)
        found = _times([members.start(_ask_gloo, rank, case, port) for rank in range(case.attention)])
    del store
    return found


def _times(attention: Sequence[Pipe]) -> list[float]:
    for pipe in attention:
        assert pipe.recv() == "ready"
    for pipe in attention:
        pipe.send("go")
    return [taken for pipe in attention for taken in pipe.recv()]


class _Members:
    """Processes that end with the block."""

    def __init__(self) -> None:
        self._processes: list[tuple[Any, Pipe]] = []

    def start(self, work: Callable[..., None], *arguments: object) -> Pipe:
        ours, theirs = _SPAWN.Pipe()
        process = _SPAWN.Process(target=_alone, args=(work, theirs, *arguments), daemon=True)
        process.start()
        theirs.close()
        self._processes.append((process, ours))
        return ours

    def __enter__(self) -> _Members:
        return self

    def __exit__(self, *_: object) -> None:
        for process, _ in self._processes:
            process.kill()
            process.join()


def _alone(work: Callable[..., None], *arguments: object) -> None:
    torch.set_num_threads(1)
    with torch.inference_mode():
        work(*arguments)


def _rounds(pipe: Pipe, case: Case, work: Callable[[], object], warmup: int) -> None:
    seconds(work, 1, warmup=warmup)
    pipe.send("ready")
    pipe.recv()
    pipe.send(seconds(work, case.rounds))
    pipe.recv()  # nobody leaves before the end


def _serve_p2p(pipe: Pipe, slot: int, case: Case, unix: bool) -> None:
    server = ExpertServer(identity, slot, WIDTH, torch.float32, SECRET, HOST, unix=unix)
    server.allow(case.expert_map.experts_of(slot), min_epoch=0)
    pipe.send(server.address)
    threading.Thread(target=_stop_at_end, args=(pipe, server), daemon=True).start()
    server.run()


def _stop_at_end(pipe: Pipe, server: ExpertServer) -> None:
    """When the measuring process ends, however it does, nothing is left behind."""
    with contextlib.suppress(EOFError):
        pipe.recv()
    server.stop()


def _ask_p2p(pipe: Pipe, rank: int, case: Case, topology: Topology) -> None:
    dispatcher = P2PDispatcher(rank, deadline_s=30, on_lost=lambda *_: None)
    gate = P2PGate(dispatcher, WIDTH, torch.float32)
    installed = gate.adopt(topology)
    while not installed.done():
        gate.begin(0, leaving=False)
        gate.wait()
    x_TD, ids_T1 = case.batch(rank)
    _rounds(pipe, case, lambda: dispatcher.combine(dispatcher.dispatch(x_TD, ids_T1, LAYER)), warmup=20)


def _form(rank: int, case: Case, port: int) -> EpochGroup:
    world = World(tuple(range(case.attention)), tuple(range(case.slots)))
    return EpochGroup.form(1, world, rank, connect_store(HOST, port, timeout_s=60), address=HOST, timeout_s=60)


def _serve_gloo(pipe: Pipe, rank: int, case: Case, port: int) -> None:
    member = ExpertRank(_form(rank, case, port), case.expert_map, rank - case.attention, identity, WIDTH, torch.float32)
    while True:
        member.serve_layer(LAYER)


def _ask_gloo(pipe: Pipe, rank: int, case: Case, port: int) -> None:
    dispatcher = AllToAllDispatcher(_form(rank, case, port), case.expert_map)
    x_TD, ids_T1 = case.batch(rank)
    # Every round is entered by all: the warm-up is followed by "ready" at the same round everywhere.
    _rounds(pipe, case, lambda: dispatcher.combine(dispatcher.dispatch(x_TD, ids_T1, LAYER)), warmup=20)


def compare(case: Case) -> dict[str, Cell]:
    """One line of the table of few rows."""
    trip = tcp_round_trip(8, case.rounds)
    trip_of_payload = tcp_round_trip(case.bytes_each_way, case.rounds)
    unix, tcp, gloo = (
        statistics.median(found) for found in (p2p_seconds(case), p2p_seconds(case, unix=False), gloo_seconds(case))
    )
    return {
        "attention x slots": f"{case.attention} x {case.slots}",
        "TCP round trip us": trip * 1e6,
        "with the payload us": trip_of_payload * 1e6,
        "p2p us": unix * 1e6,
        "ratio": unix / trip,
        "ratio to payload": unix / trip_of_payload,
        "p2p by TCP us": tcp * 1e6,
        "gloo us": gloo * 1e6,
        "gloo ratio": gloo / trip,
    }


def bandwidth(case: Case) -> dict[str, Cell]:
    """One line of the table of many rows: bytes both ways per second, against a plain echo of the same bytes."""
    nbytes = 2 * case.bytes_each_way
    echo = nbytes / tcp_round_trip(case.bytes_each_way, case.rounds)
    found = {
        "p2p": nbytes / statistics.median(p2p_seconds(case)),
        "p2p by TCP": nbytes / statistics.median(p2p_seconds(case, unix=False)),
    }
    return {
        "rows": case.rows,
        "echo GB/s": echo / 1e9,
        **{f"{name} GB/s": rate / 1e9 for name, rate in found.items()},
        **{f"{name} share": rate / echo for name, rate in found.items()},
    }


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of each case.")] = 2000,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the small batch.")] = 8,
    json_file: JsonFile = None,
) -> None:
    """Measure dispatch+combine: few rows against the TCP round trip, 512 rows against the loopback's bandwidth."""
    report = Report("dispatch")
    small = functools.partial(Case, rows=rows, rounds=rounds)
    report.add(
        f"{rows} rows x {WIDTH} floats",
        [compare(small(1, 1)), compare(small(2, 2))],
        "medians; the round trip is of 8 bytes, and of the batch's bytes each way; p2p is by Unix sockets",
    )
    report.add(
        "512 rows, 1 x 1", [bandwidth(Case(1, 1, 512, max(rounds // 5, 1)))], "bytes both ways over the median time"
    )
    report.save(json_file)


if __name__ == "__main__":
    typer.run(main)
