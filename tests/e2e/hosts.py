"""Hosts on one machine: network, processes, /tmp and memory files of their own each, joined by a bridge.

A host is what `unshare` makes: its first process, which only waits, and whatever `nsenter` starts beside it. When that
first process ends, the kernel ends all others, and the host's network goes with them. Needs root.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.e2e.conftest import ROOT

NETWORK = "198.18.0"  # set apart for tests of networks
CLIENT = f"{NETWORK}.254"  # this test's own address there


class Host:
    """One host, under `folder`/tmp of which its /tmp can be seen from outside."""

    def __init__(self, name: str, number: int, folder: Path) -> None:
        self.name = name
        self.address = f"{NETWORK}.{number}"
        self.home = folder / "tmp"
        self._outer = f"{name}-{os.getpid() % 10000}"  # the near end of its cable; at most 15 characters
        self._holder: subprocess.Popen[bytes] | None = None
        self._first = 0

    def up(self, bridge: str) -> None:
        """Makes it and plugs it in."""
        self.home.mkdir(parents=True)
        inside = (
            f"{self._seeing(ROOT)}mount --rbind {shlex.quote(str(self.home))} /tmp && mount -t tmpfs tmpfs /dev/shm && "
            f"hostname {self.name} && exec env --ignore-signal=CHLD sleep infinity"  # so no orphan of its remains
        )
        apart = ("--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "--kill-child")
        self._holder = subprocess.Popen(["unshare", *apart, "sh", "-c", inside])
        self._first = self._first_process(self._holder.pid)
        run("ip", "link", "add", self._outer, "type", "veth", "peer", "name", "eth0", "netns", str(self._first))
        run("ip", "link", "set", self._outer, "master", bridge, "up")
        for command in (
            "ip link set lo up",
            f"ip addr add {self.address}/24 dev eth0",
            "ip link set eth0 up",
            f"ip route add default via {CLIENT}",
        ):
            run(*self._entered(), *command.split())

    def _seeing(self, folder: Path) -> str:
        """A command that shows the folder in the host too, should it lie in /tmp."""
        if not folder.is_relative_to("/tmp"):
            return ""
        there = self.home / folder.relative_to("/tmp")
        there.mkdir(parents=True)
        return f"mount --bind {shlex.quote(str(folder))} {shlex.quote(str(there))} && "

    def _first_process(self, unshare: int) -> int:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            children = Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()
            if children and Path(f"/proc/{children[0]}/comm").read_text() == "sleep\n":
                return int(children[0])
            time.sleep(0.02)
        raise AssertionError(f"{self.name} did not come up")

    def start(self, *command: str, log: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Starts a command in the host, with its /tmp as home; what it says goes to that file there."""
        inherited = {
            key: value
            for key, value in os.environ.items()
            if key == "RAY_worker_niceness"  # actors as nice as other tests', which run beside them
            or not key.startswith(("RAY_", "XDG_"))
        }
        with (self.home / log).open("ab") as output:
            return subprocess.Popen(
                [*self._entered(), *command],
                env={**inherited, "HOME": "/tmp", **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def said(self, log: str) -> str:
        return (self.home / log).read_text(errors="replace")

    def until_said(
        self, log: str, words: str, process: subprocess.Popen[bytes], timeout_s: float, times: int = 1
    ) -> None:
        """Returns when the command has said `words` so often."""
        deadline = time.monotonic() + timeout_s
        while self.said(log).count(words) < times:
            assert process.poll() is None and time.monotonic() < deadline, f"{self.name}: {self.said(log)}"
            time.sleep(0.1)

    def plug(self, *, in_: bool) -> None:
        """Pulls its cable out of the bridge, or puts it back."""
        run("ip", "link", "set", self._outer, "up" if in_ else "down")

    def down(self) -> None:
        """Ends it and all in it."""
        if self._holder is not None:
            self._holder.kill()
            self._holder.wait()
        subprocess.run(["ip", "link", "del", self._outer], capture_output=True)

    def _entered(self) -> tuple[str, ...]:
        return ("nsenter", f"--target={self._first}", "--net", "--mount", "--uts", "--ipc", "--pid")


@contextmanager
def hosts(folder: Path, *names: str) -> Iterator[list[Host]]:
    """Hosts by these names, at 198.18.0.1 and so on, and this test at CLIENT in the same network."""
    bridge = f"herder{os.getpid()}"
    with ExitStack() as ending:
        run("ip", "link", "add", bridge, "type", "bridge")
        ending.callback(run, "ip", "link", "del", bridge)
        run("ip", "addr", "add", f"{CLIENT}/24", "dev", bridge)
        run("ip", "link", "set", bridge, "up")
        found = [Host(name, number, folder / name) for number, name in enumerate(names, start=1)]
        for host in found:
            ending.callback(host.down)
            host.up(bridge)
        yield found


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"
