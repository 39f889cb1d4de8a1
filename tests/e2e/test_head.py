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
from tests.e2e.streams import run_streams

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


@pytest.fixture
def deployment(tmp_path, monkeypatch) -> Iterator[Deployment]:
    monkeypatch.setenv("RAY_gcs_storage", "rocksdb")
    monkeypatch.setenv("RAY_gcs_storage_path", str(tmp_path))
    with running("attention.actors=1", "experts.actors=2", "experts.replicas=2") as found:
        yield found


def test_the_gcs_is_killed_and_comes_back(deployment):
    address = deployment.grpc_address
    control, gcs = Control(address), Gcs()
    expected = undisturbed(address, range(NEWCOMERS.stop), TOKENS)

    async def die_and_rise() -> float:
        gcs.die()
        at = time.monotonic()
        newcomers = asyncio.create_task(run_streams(address, NEWCOMERS, TOKENS))
        # However slow this machine is: Ray's processes end themselves where there is none for a minute.
        await asyncio.sleep(AWAY_S)
        gcs.rise()
        found = await newcomers
        assert {n: (found[n].tokens, found[n].error) for n in NEWCOMERS} == {n: (expected[n], "") for n in NEWCOMERS}
        return at

    def harm() -> float:
        return asyncio.run(die_and_rise())

    try:
        before = control.actors()
        gap_s, _ = disturbed(address, harm, {number: expected[number] for number in STREAMS})
        assert gap_s < 2
        control.until_whole()
        assert {name: actor.pid for name, actor in control.actors().items()} == {n: a.pid for n, a in before.items()}
        # It knows its actors again: one that dies is replaced.
        disturbed(address, harm_to(control, "expert-1"), {number: expected[number] for number in STREAMS})
        control.until_whole({"expert-1": before["expert-1"].pid})
        deployment.stop()
    finally:
        gcs.end()
