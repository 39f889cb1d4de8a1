"""`herder drain` against a control service on which a request ends with every question."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from cli import drain, endpoint
from cli.main import app
from herder.v1 import control_pb2 as pb
from tests.cli.conftest import FakeServer, free_port


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "_ASK_EVERY_S", 0.01)


@pytest.mark.parametrize(
    ("timeout", "said"), [("60", ""), ("0", "2 requests have not ended within 0 s; they are cut off")]
)
def test_it_waits_and_ends_the_process(
    cli: CliRunner, server: FakeServer, tmp_path: Path, run_folder: Path, timeout: str, said: str
) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        run = dataclasses.replace(
            server.run(tmp_path), pid=process.pid, started=psutil.Process(process.pid).create_time(), api_key="sk-1"
        )
        run.write()
        result = cli.invoke(app, ["drain", "--timeout", timeout])
        assert result.exit_code == 0, result.stderr
        assert process.wait(timeout=5) == -15
    assert said in result.stderr and f"stopped little (pid {process.pid})" in result.stderr
    assert server.asked == ["Bearer sk-1"] * (1 if said else 3)
    assert not list(run_folder.iterdir())


def test_elsewhere_it_only_drains(
    cli: CliRunner, server: FakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(endpoint.API_KEY, "sk-2")
    result = cli.invoke(app, ["drain", "--url", server.address, "--timeout", "0"])
    assert (result.exit_code, result.stderr) == (1, "herder: 2 requests have not ended within 0 s\n")
    result = cli.invoke(app, ["drain", "--url", server.address])
    assert (result.exit_code, result.stderr) == (0, f"{server.address} is drained\n")
    assert server.asked == ["Bearer sk-2"] * 3


def test_a_slot(cli: CliRunner, server: FakeServer, tmp_path: Path) -> None:
    run = server.run(tmp_path)
    result = cli.invoke(app, ["drain", "0"])
    assert result.exit_code == 0 and result.stderr.startswith("slot 0 is drained (epoch 3, ")
    assert server.asked == [pb.DrainSlotRequest(slot=0)]
    assert run.path.exists() and run.alive()
    result = cli.invoke(app, ["drain", "0", "--timeout", "1"])
    assert result.exit_code == 2 and result.stderr.startswith("herder: --timeout is for the whole deployment")


def test_nobody_answers(cli: CliRunner) -> None:
    where = f"127.0.0.1:{free_port()}"
    result = cli.invoke(app, ["drain", "--url", where])
    assert (result.exit_code, result.stderr) == (1, f"herder: nothing answers at {where}\n")


def test_addresses() -> None:
    assert endpoint.grpc_server("10.0.0.7:9000").roots is None
    over_tls = endpoint.grpc_server("grpcs://10.0.0.7:9000/")
    assert (over_tls.where, over_tls.roots, over_tls.metadata) == ("10.0.0.7:9000", b"", ())
