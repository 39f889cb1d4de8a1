"""One machine's part of a Ray cluster, kept by a process in the foreground: what `herder up` and `herder join` share.

`ray start --block` runs as a child. Its processes end with it, and nothing else of Ray on this machine is touched.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Annotated

import psutil
import typer

from actors.giving_way import housekeeping_gives_way
from cli.report import CliError, err
from cli.serve import cause, ending_on_signals, ending_signals
from cluster.ray_environment import RAY_ENVIRONMENT

if TYPE_CHECKING:  # ray comes with it: not for `herder --help`
    from cluster.launch import Machine

RAY = (sys.executable, "-m", "ray.scripts.scripts")
_UP = "Ray runtime started"
_TOO_SLOW = "timed out during startup"  # Ray gives a node thirty seconds, which a busy machine may not have
_STARTS = 3
_START_TIMEOUT_S = 120.0
_LEAVE_TIMEOUT_S = 60.0
_LOOK_EVERY_S = 0.2

NodeIp = Annotated[
    str | None,
    typer.Option(help="This machine's address in the cluster's network; else that of the route there.", metavar="IP"),
]
Resources = Annotated[
    list[str] | None,
    typer.Option(
        "--resource",
        metavar="NAME=AMOUNT",
        help="What this machine offers to `attention.resources` and `experts.resources`, as expert_host=2. Repeatable.",
    ),
]
RayOptions = Annotated[
    list[str] | None, typer.Argument(metavar="[-- OPTIONS]", help="Further options of `ray start`.", show_default=False)
]


class RayNode:
    """A `ray start --block` that has brought its node up."""

    def __init__(self, process: subprocess.Popen[bytes], output: IO[bytes]) -> None:
        self._process = process
        self._output = output

    def until_lost(self) -> str:
        """Waits until Ray has ended here by itself; returns why."""
        raylet = _raylet_of(self._process)
        if raylet is None:
            raise CliError("Ray has ended at once")
        while self._process.poll() is None:
            # `ray start` stays without a raylet if that has ended in order, as by a drain of its node.
            if not _lives(raylet):
                return "its raylet has ended"
            time.sleep(_LOOK_EVERY_S)
        return _fault(_text(self._output))


@contextmanager
def ray_node(arguments: Sequence[str], drain_s: float) -> Iterator[RayNode]:
    """A node of Ray's under these arguments of `ray start`, ended at the end. Raises CliError with what keeps it away.

    On Linux, Ray's processes die with the `ray start` that made them, whatever ends it.

    Args:
        drain_s: when it leaves in order, seconds for Serve to move its replicas to other nodes.
    """
    environment = RAY_ENVIRONMENT | {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = f"{drain_s:g}"
    environment.setdefault("RAY_AUTH_MODE", "token")
    with tempfile.TemporaryFile() as output:
        for _ in range(_STARTS):
            output.seek(0)  # a process writes where we are
            output.truncate()
            with _ray_start(arguments, environment, output) as process:
                why_not = _comes_up(process, output)
                if why_not is None:
                    housekeeping_gives_way(psutil.Process(process.pid))
                    yield RayNode(process, output)
                    return
            err().print(f"Ray has not started: {why_not}")
        raise CliError(f"Ray did not start in {_STARTS} tries: {why_not}")


@contextmanager
def _ray_start(
    arguments: Sequence[str], environment: Mapping[str, str], output: IO[bytes]
) -> Iterator[subprocess.Popen[bytes]]:
    """`ray start --block`, ended at the end: by Ctrl-C in order."""
    process = subprocess.Popen(
        [*RAY, "start", "--block", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        # Ctrl-C is for us to hand on, once. No session of its own: Linux shares CPUs out among sessions first, so that
        # a node that starts would wait for whatever another one computes, however nice that is.
        process_group=0,
    )
    try:
        yield process
    except KeyboardInterrupt:
        _leave(process)
        raise
    finally:
        process.kill()
        process.wait()


def _comes_up(process: subprocess.Popen[bytes], output: IO[bytes]) -> str | None:
    """Waits until the node is up; if it did not come up but may do so another time, why. Raises CliError."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    raylet = None
    while _UP not in _text(output):
        raylet = raylet or _raylet_of(process)
        if process.poll() is not None:
            text = _text(output)
            if _TOO_SLOW in text:
                return _fault(text)
            raise CliError(f"Ray did not start: {_fault(text)}")
        if time.monotonic() >= deadline:
            raise CliError(f"Ray has not started within {_START_TIMEOUT_S:g} s")
        if raylet is not None and not _lives(raylet):  # Ray itself waits for it nevertheless, till its time is over
            return "its raylet ended while it started; raylet.out, in the logs of Ray's session, says why"
        time.sleep(_LOOK_EVERY_S)
    return None


def _raylet_of(process: subprocess.Popen[bytes]) -> psutil.Process | None:
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children():
            if child.name() == "raylet":
                return child
    return None


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def cluster_machines() -> list[Machine]:
    """The machines of the cluster, this one among them, as its head sees them. Raises CliError."""
    from cluster.launch import machines

    try:
        return machines()
    except Exception as error:  # Ray's own, of many kinds
        raise CliError(f"Ray has started here, but its head cannot be asked: {cause(error)}") from error


def _leave(process: subprocess.Popen[bytes]) -> None:
    """Ends a node in order, unless another signal comes."""
    with ending_on_signals():
        try:
            err().print("leaving; Ctrl-C again to leave at once")
            process.send_signal(signal.SIGTERM)
            process.wait(_LEAVE_TIMEOUT_S)
        except (KeyboardInterrupt, subprocess.TimeoutExpired):
            pass
        finally:
            ending_signals(signal.SIG_IGN)


def _text(output: IO[bytes]) -> str:
    return os.pread(output.fileno(), os.fstat(output.fileno()).st_size, 0).decode(errors="replace")


def _fault(text: str) -> str:
    """What went wrong, out of all that `ray start` says: its last exception, or else its last line."""
    found = re.findall(r"^[\w.]*(?:Error|Exception): (.+?)(?=\n\S*Error|\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    lines = [line for line in text.splitlines() if line.strip()]
    return " ".join((found or lines or ["it said nothing"])[-1].split())


def resource_arguments(resources: Sequence[str] | None) -> list[str]:
    """`NAME=AMOUNT`s as `ray start` takes them. Raises CliError."""
    amounts: dict[str, float] = {}
    for resource in resources or ():
        name, _, amount = resource.partition("=")
        try:
            amounts[name] = float(amount)
        except ValueError:
            amounts[name] = 0.0
        if not name or amounts[name] <= 0:
            raise CliError(f"--resource {resource}: must have the form NAME=AMOUNT, such as expert_host=2", code=2)
    return [f"--resources={json.dumps(amounts)}"] if amounts else []
