"""How long streams of a running server wait for a token when one of its actors is killed, and when none is."""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal

import grpc
import typer

from bench.burst import Watched
from bench.clients import Client, over_grpc
from bench.common import Cell, JsonFile, Report
from bench.load import Ask
from bench.priority import before_the_server
from herder.v1 import control_pb2, control_pb2_grpc

_BEGUN = 0.3  # of all tokens have come when the actor is killed
_AFTER_S = 20.0  # so long the streams are watched behind it
_TIMEOUT_S = 60.0
_PATIENCE_S = 300.0  # for full strength to come back


class Deployment:
    """The running server's actors; they are processes of this machine."""

    def __init__(self, address: str) -> None:
        self._stub = control_pb2_grpc.ControlServiceStub(grpc.insecure_channel(address))

    def pids(self, role: str) -> dict[str, int]:
        """Of the actors whose names begin so, by name."""
        info = self._stub.GetServerInfo(control_pb2.GetServerInfoRequest(), timeout=_TIMEOUT_S)
        return {actor.name: actor.pid for actor in info.actors if actor.name.startswith(role) and info.ready}

    def until_replaced(self, name: str, pid: int) -> None:
        """Returns when another process serves in this one's place. Raises TimeoutError."""
        deadline = time.monotonic() + _PATIENCE_S
        while self.pids(name).get(name, pid) == pid:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name} has not come back within {_PATIENCE_S:g} s")
            time.sleep(0.2)


async def longest_pause(client: Client, asks: Sequence[Ask], harm: Callable[[], object]) -> tuple[float, float]:
    """Streams all answers, does `harm` in their midst; the longest and the median seconds between tokens after it."""
    watched = Watched()
    async with asyncio.TaskGroup() as group:
        for ask in asks:
            group.create_task(watched.follow(client, [ask]))
        while sum(map(len, watched.streams)) < _BEGUN * sum(ask.max_tokens for ask in asks):
            await asyncio.sleep(0.01)
        at = time.perf_counter()
        harm()
    # A pause counts from the stream's last token before the harm on.
    begins = min((max((t for t in times if t <= at), default=at) for times in watched.streams), default=at)
    pauses = watched.pauses(begins, at + _AFTER_S)
    return max(pauses), statistics.median(pauses)


def victims(deployment: Deployment, role: str, kills: int) -> Iterator[tuple[str, int]]:
    """The actors of a role in turn, each as it is by then."""
    for number in range(kills):
        found = sorted(deployment.pids(role).items())
        yield found[number % len(found)]


def row(what: str, pauses: Sequence[tuple[float, float]]) -> dict[str, Cell]:
    """Of several rounds: the median and the worst of their longest pauses, and what is usual."""
    longest = [found for found, _ in pauses]
    return {
        "": what,
        "rounds": len(pauses),
        "longest pause ms, median": statistics.median(longest) * 1e3,
        "worst": max(longest) * 1e3,
        "median pause ms": statistics.median(usual for _, usual in pauses) * 1e3,
    }


def main(
    address: Annotated[str, typer.Option(help="gRPC endpoint of a server on this machine.")] = "127.0.0.1:9000",
    streams: Annotated[int, typer.Option(min=1, help="Answers at a time.")] = 100,
    tokens: Annotated[int, typer.Option(min=2, help="Of each answer.")] = 150,
    kills: Annotated[int, typer.Option(min=1, help="How often an actor is killed.")] = 10,
    role: Annotated[str, typer.Option(help="Whom: expert or attention.")] = "expert",
    by: Annotated[
        Literal["KILL", "STOP"], typer.Option(help="The signal; who is stopped hangs, until the deadline.")
    ] = "KILL",
    calm: Annotated[int, typer.Option(min=1, help="Rounds before, in which nobody is.")] = 5,
    json_file: JsonFile = None,
) -> None:
    """Kill or stop an actor of a running server amid streams, again and again, and print their longest pause."""
    deployment = Deployment(address)
    asks = [Ask(0.0, [65 + number % 100], tokens) for number in range(streams)]

    def watch(harm: Callable[[], object]) -> tuple[float, float]:
        return over_grpc(address, lambda client: longest_pause(client, asks, harm))

    killed = []
    with before_the_server() as precedence:
        undisturbed = [watch(lambda: None) for _ in range(calm)]
        for name, pid in victims(deployment, role, kills):
            killed.append(watch(lambda pid=pid: os.kill(pid, signal.Signals[f"SIG{by}"])))  # type: ignore[misc]
            deployment.until_replaced(name, pid)
    report = Report(f"{streams} streams of {tokens} tokens")
    rows = [row("nobody killed", undisturbed), row(f"{role}, SIG{by}", killed)]
    note = f"from token to token, within {_AFTER_S:g} s; every stream came to its end; {precedence}"
    report.add("pauses of any stream", rows, note)
    report.save(json_file)


if __name__ == "__main__":
    typer.run(main)
