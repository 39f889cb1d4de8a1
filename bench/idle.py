"""What an idle deployment's processes take of a core, beside as many empty Ray actors on the same cluster.

A Ray worker is never quite idle: it looks for signals every 10 ms, reports to the head and the node, and so on. The
empty actors show how much of the figure is that.
"""

from __future__ import annotations

import os
import time
from typing import Annotated, Any

import psutil
import ray
import typer

from bench.common import Cell, JsonFile, Report
from bench.failover import Deployment

_EMPTY = "empty actors"
_REPLICA = "ray::ServeReplica:herder:"  # the titles of the gateways' and encoders' processes begin so


@ray.remote(num_cpus=0)
class _Empty:
    def pid(self) -> int:
        return os.getpid()


def _herders(address: str) -> dict[str, psutil.Process]:
    """The deployment's actors and its replicas under Ray Serve, by name."""
    found = {name: psutil.Process(pid) for name, pid in Deployment(address).pids("").items()}
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or [])
        if title.startswith(_REPLICA):
            found[f"{title.removeprefix(_REPLICA).strip()} {process.pid}"] = process
    return found


def _used(processes: dict[str, psutil.Process]) -> dict[str, float]:
    """CPU seconds, by name."""
    times = {name: process.cpu_times() for name, process in processes.items()}
    return {name: taken.user + taken.system for name, taken in times.items()}


def main(
    address: Annotated[
        str, typer.Option(help="The server's gRPC address; it runs on this machine.")
    ] = "127.0.0.1:9000",
    seconds: Annotated[float, typer.Option(min=1, help="How long each measurement is.")] = 20.0,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements.")] = 3,
    json_file: JsonFile = None,
) -> None:
    """Measure the CPU time of an idle deployment's processes, and of as many empty actors, in the same seconds."""
    report = Report(f"idle, {address}")
    ours = _herders(address)
    ray.init(address="auto", log_to_driver=False)
    empty: list[Any] = [_Empty.remote() for _ in ours]
    pids = ray.get([actor.pid.remote() for actor in empty])
    processes = ours | {f"{_EMPTY} {pid}": psutil.Process(pid) for pid in pids}
    time.sleep(2)  # for what starting them has left to do
    rows: list[dict[str, Cell]] = []
    for _ in range(repeats):
        before, start = _used(processes), time.perf_counter()
        time.sleep(seconds)
        after, took = _used(processes), time.perf_counter() - start
        share = {name: 100 * (after[name] - before[name]) / took for name in processes}
        taken = sum(share[name] for name in ours)
        rays = sum(share.values()) - taken
        rows.append(
            {f"{len(ours)} processes": taken, f"{len(ours)} {_EMPTY}": rays, "Herder's own": taken - rays}
            | {name: share[name] for name in sorted(ours)}
        )
    report.add("% of a core", rows)
    report.save(json_file)


if __name__ == "__main__":
    typer.run(main)
