"""How long streams of a running server wait for a token while expert actors come and go, and while experts move."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Annotated

import grpc
import typer

from bench.burst import Watched
from bench.clients import Client, over_grpc
from bench.common import Cell, JsonFile, Report
from bench.load import Ask
from bench.priority import before_the_server
from herder.v1 import control_pb2 as pb
from herder.v1 import control_pb2_grpc

_WARM_S = 2.0  # for all streams to be under way
_CALM_S = 10.0
_BEHIND_S = 1.0  # what a change has begun may still be felt
_TIMEOUT_S = 300.0  # of a change


class Pool:
    """The running server's expert actors."""

    def __init__(self, address: str) -> None:
        self._stub = control_pb2_grpc.ControlServiceStub(grpc.insecure_channel(address))

    def scale(self, actors: int) -> None:
        self._stub.ScaleExperts(pb.ScaleExpertsRequest(actors=actors), timeout=_TIMEOUT_S)

    def move_one(self) -> None:
        """Moves the first layer's first expert to a slot that has none of its replicas."""
        layer = self._stub.GetExpertPlacement(pb.GetExpertPlacementRequest(), timeout=_TIMEOUT_S).layers[0]
        holders = layer.experts[0].slots
        info = self._stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=_TIMEOUT_S)
        slots = [actor.index for actor in info.actors if actor.role == pb.ACTOR_ROLE_EXPERT]
        to_slot = next(slot for slot in slots if slot not in holders)
        self._stub.MoveExpert(pb.MoveExpertRequest(expert=0, layer=layer.layer, to_slot=to_slot), timeout=_TIMEOUT_S)


async def pauses_during(client: Client, asks: Sequence[Ask], change: Callable[[], object]) -> tuple[list[float], float]:
    """Seconds from token to token, of all streams, from the change's begin until a second behind it; its seconds.

    Raises RuntimeError if an answer has come to its end by then.
    """
    watched = Watched()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(watched.follow(client, [ask])) for ask in asks]
        await asyncio.sleep(_WARM_S)
        begin = time.perf_counter()
        await asyncio.to_thread(change)
        took = time.perf_counter() - begin
        await asyncio.sleep(_BEHIND_S)
        ended = sum(task.done() for task in tasks)
        for task in tasks:
            task.cancel()
    if ended:
        raise RuntimeError(f"{ended} of {len(asks)} answers ended before the change did: let them have more tokens")
    return watched.pauses(begin, time.perf_counter()), took


def row(what: str, pauses: Sequence[float], took: float) -> dict[str, Cell]:
    usual, longest = statistics.median(pauses), max(pauses)
    return {
        "": what,
        "took s": took,
        "median pause ms": usual * 1e3,
        "longest pause ms": longest * 1e3,
        "longest / median": longest / usual,
    }


def main(
    address: Annotated[str, typer.Option(help="gRPC endpoint of a server with two expert actors.")] = "127.0.0.1:9000",
    streams: Annotated[int, typer.Option(min=1, help="Answers at a time.")] = 64,
    tokens: Annotated[int, typer.Option(min=2, help="Of each answer: enough to last through a change.")] = 1800,
    json_file: JsonFile = None,
) -> None:
    """Scale the experts of a running server from 2 to 4, 3 and 2 amid streams, and move one, and print the pauses."""
    pool = Pool(address)
    asks = [Ask(0.0, [65 + number % 100], tokens) for number in range(streams)]

    changes: dict[str, Callable[[], object]] = {
        "nothing changes": lambda: time.sleep(_CALM_S),
        "2 to 4 expert actors": lambda: pool.scale(4),
        "an expert moves": pool.move_one,
        "4 to 3 expert actors": lambda: pool.scale(3),
        "3 to 2 expert actors": lambda: pool.scale(2),
    }

    def watch(change: Callable[[], object]) -> tuple[list[float], float]:
        return over_grpc(address, lambda client: pauses_during(client, asks, change))

    with before_the_server() as precedence:
        rows = [row(what, *watch(change)) for what, change in changes.items()]
    report = Report(f"{streams} streams")
    report.add("from token to token of any stream", rows, precedence)
    report.save(json_file)


if __name__ == "__main__":
    typer.run(main)
