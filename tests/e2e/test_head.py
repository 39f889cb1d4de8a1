"""Ray's record of the cluster (the GCS, on its head) dies while streams run, and comes back from what is on disk."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Iterator

import psutil
import pytest
import ray

from actors.deployment import Deployment
from tests.e2e.conftest import running
from tests.e2e.harm import Control, disturbed, harm_to, undisturbed
from tests.e2e.streams import Stream, run_streams

pytestmark = pytest.mark.cluster

STREAMS, NEWCOMERS = range(16), range(16, 20)
TOKENS = 200
AWAY_S = 4.0


class Gcs:
    """The server's process, which is this one's descendant, and later its successor."""

    def __init__(self) -> None:
        self._process = next(one for one in psutil.Process().children(recursive=True) if one.name() == "gcs_server")
        port = ray.get_runtime_context().gcs_address.rpartition(":")[2]
        option = "--gcs_server_port="  # 0, any one, at first
        self._command = [option + port if word.startswith(option) else word for word in self._process.cmdline()]
        self._environment = self._process.environ()
        self._successor: subprocess.Popen[bytes] | None = None

    def die(self) -> None:
        self._process.kill()
        self._process.wait(10)

    def rise(self) -> None:
        """As Ray's head starts it."""
        self._successor = subprocess.Popen(self._command, env=self._environment, stdout=subprocess.DEVNULL)

    def end(self) -> None:
        if self._successor is not None:
            self._successor.kill()
            self._successor.wait()


def _is_half_done(stream: Stream | None) -> bool:
    return stream is not None and len(stream.tokens) >= TOKENS // 2


@pytest.fixture
def deployment(tmp_path, monkeypatch) -> Iterator[tuple[Deployment, Gcs]]:
    monkeypatch.setenv("RAY_gcs_storage", "rocksdb")
    monkeypatch.setenv("RAY_gcs_storage_path", str(tmp_path))
    gcs: Gcs | None = None
    try:
        with running("attention.actors=1", "experts.actors=2", "experts.replicas=2") as found:
            gcs = Gcs()
            yield found, gcs
    finally:
        if gcs is not None:
            gcs.end()


def test_the_gcs_is_killed_and_comes_back(deployment):
    found, gcs = deployment
    address = found.grpc_address
    control = Control(address)
    expected = undisturbed(address, range(NEWCOMERS.stop), TOKENS)

    async def die_and_rise() -> float:
        gcs.die()
        at = time.monotonic()
        newcomers = asyncio.create_task(run_streams(address, NEWCOMERS, TOKENS, late))
        try:
            # However slow this machine is, not longer: Ray's processes end themselves where there is none for a minute.
            while time.monotonic() < at + AWAY_S and not all(_is_half_done(late.get(n)) for n in NEWCOMERS):
                await asyncio.sleep(0.02)
        finally:
            gcs.rise()
        risen.append(time.monotonic())
        await newcomers
        return at

    late: dict[int, Stream] = {}
    risen: list[float] = []
    before = control.actors()
    running_on = {number: expected[number] for number in STREAMS}
    gap_s, _ = disturbed(address, lambda: asyncio.run(die_and_rise()), running_on)
    assert gap_s < 2
    assert {n: (late[n].tokens, late[n].error) for n in NEWCOMERS} == {n: (expected[n], "") for n in NEWCOMERS}
    assert max(stream.times[-1] for stream in late.values()) > risen[0]
    control.until_whole()
    assert {name: actor.pid for name, actor in control.actors().items()} == {n: a.pid for n, a in before.items()}
    # It knows its actors again: one that dies is replaced.
    disturbed(address, harm_to(control, "expert-1"), running_on)
    control.until_whole({"expert-1": before["expert-1"].pid})
