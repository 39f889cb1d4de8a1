"""`herder up` and `herder join` over a `ray start` of the test's own. The real one is in tests/e2e/test_hosts.py."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import cli.join
import cli.ray_node
import cli.up
from cli.main import app
from cluster.launch import Machine
from tests.cli.conftest import free_port

# Notes its arguments and that it was told to leave. Its node lives as long as LIFE says, as one that is taken for dead.
RAY = """
import json, os, signal, subprocess, sys
def note(*words):
    with open({notes!r}, "a") as notes:
        print(json.dumps(words), file=notes)
note(*sys.argv[1:])
fault = open({fault!r}).read()
if "start" in sys.argv and (slow := open({slow!r}).read()):
    open({slow!r}, "w").write(slow[1:])
    if slow[0] == "d":
        subprocess.Popen([{raylet!r}, "0.2"])
        signal.pause()
    sys.exit("Exception: The current node timed out during startup. It could be overloaded.")
if fault or "start" not in sys.argv:
    print(fault)
    sys.exit(1 if fault else 0)
assert os.environ["RAY_worker_niceness"] == "0"
raylet = subprocess.Popen([{raylet!r}, os.environ.get("LIFE", "20")])
def leave(*_):
    note("left")
    raylet.kill()
    sys.exit(1)
signal.signal(signal.SIGTERM, leave)
print("Ray runtime started.", flush=True)
while True:
    signal.pause()
"""
MISMATCH = """Traceback (most recent call last):
  File "node.py", line 1, in check_version_info
    raise RuntimeError(mismatch_msg)
RuntimeError: Version mismatch: The cluster was started with:
    Ray: 2.59.0
    Python: 3.12.1
This process on node 10.0.0.2 was started with:
    Ray: 2.60.0
    Python: 3.11.7

"""


class FakeRay:
    def __init__(self, folder: Path) -> None:
        self._notes, self._fault, script = folder / "notes", folder / "fault", folder / "ray.py"
        self._slow = folder / "slow"
        raylet = shutil.copy(shutil.which("sleep") or "", folder / "raylet")
        script.write_text(
            RAY.format(notes=str(self._notes), fault=str(self._fault), slow=str(self._slow), raylet=str(raylet))
        )
        self.command = (sys.executable, str(script))
        self.fail("")
        self.be_slow("")

    def fail(self, words: str) -> None:
        self._fault.write_text(words)

    def be_slow(self, starts: str) -> None:
        """Starts come to nothing: for each t one is too slow for Ray, for each d one waits for a raylet that died."""
        self._slow.write_text(starts)

    def notes(self) -> list[list[str]]:
        return [json.loads(line) for line in self._notes.read_text().splitlines()]


@pytest.fixture
def ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay(tmp_path)
    monkeypatch.setattr(cli.ray_node, "RAY", fake.command)
    monkeypatch.setattr(cli.up, "RAY", fake.command)
    monkeypatch.setattr(cli.join, "_PAUSE_S", 0.01)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_worker_niceness", raising=False)
    return fake


def machines(until: int, *signals: signal.Signals) -> Iterator[list[Machine]]:
    """What the cluster looks like each time it is asked; at the `until`th, these signals come to us."""
    for number in range(1, until + 1):
        if number == until:
            for number_of in signals:
                signal.raise_signal(number_of)
        head = Machine("10.0.0.1", {"CPU": 2.0, "node:10.0.0.1": 1.0, "memory": 9e9}, here=False)
        yield [head, Machine("10.0.0.2", {"CPU": 8.0, "GPU": 4.0, "object_store_memory": 9e9}, here=True)]


@pytest.mark.parametrize(
    ("slow", "reason"), [("tt", "timed out during startup"), ("ttt", "timed out during startup"), ("dd", "raylet.out")]
)
def test_a_start_that_is_too_slow_for_ray_is_tried_again(
    cli: CliRunner, ray: FakeRay, monkeypatch: pytest.MonkeyPatch, slow: str, reason: str
) -> None:
    found = machines(1, signal.SIGINT)
    monkeypatch.setattr("cluster.launch.machines", lambda: next(found))
    ray.be_slow(slow)
    result = cli.invoke(app, ["up", "--head", "--node-ip", "127.0.0.1", "--port", str(free_port())])
    assert result.exit_code == (0 if len(slow) < 3 else 1), result.stderr
    assert reason in result.stderr
    assert ("did not start" in result.stderr) == (len(slow) == 3)
    assert sum(words[0] == "start" for words in ray.notes()) == 3


@pytest.fixture
def head() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_head_runs_until_a_signal(
    cli: CliRunner, ray: FakeRay, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    found, port = machines(1, number), str(free_port())
    before = signal.getsignal(number)
    monkeypatch.setattr("cluster.launch.machines", lambda: next(found))
    command = [
        "up",
        "--head",
        "--port",
        port,
        "--node-ip",
        "127.0.0.1",
        "--resource",
        "attends=2",
        "--",
        "--num-gpus",
        "8",
    ]
    result = cli.invoke(app, command)
    assert result.exit_code == 0, result.stderr
    token, start, left = ray.notes()
    assert token == ["get-auth-token", "--generate"]
    assert start[:4] == ["start", "--block", "--head", f"--port={port}"]
    assert start[4:] == ["--node-ip-address=127.0.0.1", '--resources={"attends": 2.0}', "--num-gpus", "8"]
    assert left == ["left"]
    assert signal.getsignal(number) == before


def test_the_head_says_what_to_type_elsewhere_and_its_own_end(
    cli: CliRunner, ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, port = machines(2), str(free_port())
    monkeypatch.setattr("cluster.launch.machines", lambda: next(found))
    monkeypatch.setenv("LIFE", "0.3")
    result = cli.invoke(app, ["up", "--head", "--node-ip", "::1", "--port", port])
    assert result.exit_code == 1
    assert f"herder join [::1]:{port}" in result.stdout
    assert "8 CPU, 4 GPU" in result.stdout and "memory" not in result.stdout
    assert "the head has ended" in result.stderr


def test_a_machine_joins_again_as_often_as_it_is_taken_for_dead(
    cli: CliRunner, ray: FakeRay, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = machines(3, signal.SIGTERM)
    monkeypatch.setattr("cluster.launch.machines", lambda: next(found))
    monkeypatch.setenv("LIFE", "0.3")
    result = cli.invoke(app, ["join", head, "--resource", "expert_host=1.5"])
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count(f"10.0.0.2 is in the cluster at {head} with 8 CPU, 4 GPU; 2 machines are") == 2
    assert result.stderr.count("joining again") == 2
    *starts, left = ray.notes()
    assert starts == [["start", "--block", f"--address={head}", '--resources={"expert_host": 1.5}']] * 3
    assert left == ["left"]


def test_a_port_in_use(cli: CliRunner, ray: FakeRay, head: str) -> None:
    host, _, port = head.partition(":")
    result = cli.invoke(app, ["up", "--head", "--node-ip", host, "--port", port])
    assert result.exit_code == 2 and "--node-ip, --port: Address already in use" in result.stderr


def test_what_keeps_a_machine_from_joining_is_one_sentence(cli: CliRunner, ray: FakeRay, head: str) -> None:
    ray.fail(MISMATCH)
    result = cli.invoke(app, ["join", head])
    assert result.exit_code == 1 and "Traceback" not in result.stderr
    assert (
        "Version mismatch: The cluster was started with: Ray: 2.59.0 Python: 3.12.1 This process on node 10.0.0.2 was "
        "started with: Ray: 2.60.0 Python: 3.11.7"
    ) in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (["up"], "--head", 2),
        (["up", "--head", "--resource", "attends"], "--resource attends: must have the form NAME=AMOUNT", 2),
        (["up", "--head", "--resource", "attends=-1"], "--resource attends=-1", 2),
        (["join", "10.0.0.1"], "ADDRESS 10.0.0.1: must have the form HOST:PORT", 2),
        (["join", "10.0.0.1:99999"], "must have the form HOST:PORT", 2),
        (["join", "127.0.0.1:1"], "ADDRESS: nothing answers at 127.0.0.1:1 (Connection refused)", 1),
    ],
)
def test_wrong_input(cli: CliRunner, ray: FakeRay, arguments: list[str], said: str, code: int) -> None:
    result = cli.invoke(app, arguments)
    assert (result.exit_code, said in result.stderr) == (code, True), result.stderr
