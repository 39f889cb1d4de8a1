"""What an operator does to a live deployment, good or bad, and streams that must not notice."""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import ray
from ray.util.state import list_actors

from herder.v1 import control_pb2, control_pb2_grpc
from tests.e2e.streams import Stream, run_streams


class Control:
    """What an operator sees and does."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self.stub = control_pb2_grpc.ControlServiceStub(self._channel)

    def info(self) -> control_pb2.GetServerInfoResponse:
        return self.stub.GetServerInfo(control_pb2.GetServerInfoRequest(), timeout=60)

    def actors(self) -> dict[str, control_pb2.ActorInfo]:
        return {actor.name: actor for actor in self.info().actors}

    def engines(self) -> list[control_pb2.EngineLoad]:
        return list(self.stub.GetLoad(control_pb2.GetLoadRequest(), timeout=60).engines)

    def hurt(self, name: str, how: signal.Signals = signal.SIGKILL) -> float:
        """Signals an actor's process; returns when."""
        os.kill(self.actors()[name].pid, how)
        return time.monotonic()

    def until_whole(self, but: dict[str, int] | None = None, timeout_s: float = 60) -> None:
        """Returns when every actor serves, and those in `but` by another process than then."""
        deadline = time.monotonic() + timeout_s
        while not self._is_whole(but or {}):
            assert time.monotonic() < deadline, self.info()
            time.sleep(0.2)

    def _is_whole(self, but: Mapping[str, int]) -> bool:
        try:
            info = self.info()
        except grpc.RpcError as error:  # the controller is away
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            return False
        pids = {actor.name: actor.pid for actor in info.actors}
        replaced = all(pids.get(name) not in (None, 0, pid) for name, pid in but.items())
        return info.ready and replaced and all(actor.state in ("serving", "ready") for actor in info.actors)


def undisturbed(address: str, numbers: range, max_tokens: int) -> dict[int, list[int]]:
    """What the streams say when nobody disturbs them."""
    streams = asyncio.run(run_streams(address, numbers, max_tokens))
    assert not [stream.error for stream in streams.values() if stream.error]
    return {number: stream.tokens for number, stream in streams.items()}


def disturbed(address: str, harm: Callable[[], float], expected: Mapping[int, list[int]]) -> tuple[float, float]:
    """Streams with harm in their midst, compared with `expected`.

    `harm` returns when it was done. Returns the longest gap after it and the median gap, in seconds.
    """
    tokens = len(next(iter(expected.values())))
    streams: dict[int, Stream] = {}
    at = 0.0

    async def midway() -> None:
        nonlocal at
        while sum(len(stream.tokens) for stream in streams.values()) < 0.3 * tokens * len(expected):
            await asyncio.sleep(0.02)
        at = await asyncio.to_thread(harm)

    async def both() -> None:
        running_streams: Awaitable[dict[int, Stream]] = run_streams(address, list(expected), tokens, streams)
        await asyncio.gather(running_streams, midway())

    asyncio.run(both())
    assert not {number: stream.error for number, stream in streams.items() if stream.error}
    wrong = {n: _difference(stream, expected[n]) for n, stream in streams.items() if stream.tokens != expected[n]}
    assert not wrong, f"harm at {at}: {wrong}"
    gaps = [b - a for stream in streams.values() for a, b in zip(stream.times, stream.times[1:], strict=False)]
    return max(stream.longest_gap(at, at + 20) for stream in streams.values()), statistics.median(gaps)


def _difference(stream: Stream, expected: list[int]) -> str:
    """Where an answer leaves what was expected, and when that token came (time.monotonic)."""
    pairs = zip(stream.tokens, expected, strict=False)
    place = next(
        (n for n, (token, other) in enumerate(pairs) if token != other), min(len(stream.tokens), len(expected))
    )
    times = [round(time, 2) for time in stream.times[place : place + 1]]
    around = slice(place, place + 8)
    return f"token {place} of {len(stream.tokens)}, at {times}: {stream.tokens[around]} for {expected[around]}"


def harm_to(control: Control, name: str, how: signal.Signals = signal.SIGKILL) -> Callable[[], float]:
    """Signals the process that the actor has now: while streams run, asking for it takes as long as they do."""
    pid = control.actors()[name].pid

    return lambda: kill(pid, how)


def kill(pid: int, how: signal.Signals = signal.SIGKILL) -> float:
    """Signals a process; returns when."""
    os.kill(pid, how)
    return time.monotonic()


def pid_of(class_name: str) -> int | None:
    """The process of the only living actor of this class; None when there is none just now."""
    found = list_actors(address=ray.get_runtime_context().gcs_address)
    pids = [actor.pid for actor in found if actor.class_name == class_name and actor.state == "ALIVE"]
    assert len(pids) <= 1, pids
    return pids[0] if pids else None


def role_of(title: str) -> str:
    """The class of the actor with this process title. While only the call named for its state runs, that is in it."""
    for name, role in (("controller", "Controller"), ("attention-", "AttentionActor"), ("expert-", "ExpertActor")):
        if title.startswith(f"ray::{name}"):
            return f"ray::{role}"
    return title.split(".")[0]


@dataclass(frozen=True)
class Census:
    """What a deployment takes up on this machine.

    `roles`: how many processes do each work; `processes`: all, with idle and dead ones; `sockets`: files where its
    processes listen for rows; `open_files` and `rss_bytes`: of those at work, by process.
    """

    roles: Counter[str]
    processes: int
    named_actors: int
    placement_groups: int
    kv_pages: int
    sockets: int
    open_files: dict[int, int]
    rss_bytes: dict[int, int]

    @classmethod
    def take(cls, control: Control) -> Census:
        roles: Counter[str] = Counter()
        open_files, rss_bytes = {}, {}
        listening: set[Path] = set()  # the folders: other tests have theirs
        processes = psutil.Process().children(recursive=True)
        for process in processes:
            with suppress(psutil.NoSuchProcess):  # it ends just now
                title = "".join(process.cmdline()[:1])
                if title.startswith("ray::") and title != "ray::IDLE":
                    roles[role_of(title)] += 1
                    open_files[process.pid] = process.num_fds()
                    rss_bytes[process.pid] = process.memory_info().rss
                    paths = (Path(str(one.laddr)) for one in process.net_connections("unix"))
                    listening |= {path.parent for path in paths if path.name.startswith("slot-")}
        groups = ray.util.placement_group_table().values()
        return cls(
            roles,
            len(processes),
            len(ray.util.list_named_actors(all_namespaces=True)),
            sum(group["state"] != "REMOVED" for group in groups),
            sum(pool.used for engine in control.engines() for pool in engine.kv_pages),
            sum(len(list(folder.iterdir())) for folder in listening),
            open_files,
            rss_bytes,
        )
