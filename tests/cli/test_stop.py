"""`herder stop` and the run files that it goes by."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from cli.main import app
from cli.runfile import Run, find_run, live_runs


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def run_of(pid: int, port: int = 8000) -> Run:
    run = Run(pid, psutil.Process(pid).create_time(), port, "", "", "c.yaml", "tiny", "/models/tiny")
    run.write()
    return run


def test_it_ends_the_process_and_waits(cli: CliRunner, sleeper: subprocess.Popen[bytes], run_folder: Path) -> None:
    run_of(sleeper.pid)
    result = cli.invoke(app, ["stop"])
    assert result.exit_code == 0, result.stderr
    assert f"stopped tiny (pid {sleeper.pid})" in result.stderr
    assert sleeper.wait(timeout=5) == -15
    assert not list(run_folder.iterdir())


def test_one_that_does_not_end_in_time(cli: CliRunner) -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        run_of(process.pid)
        result = cli.invoke(app, ["stop", "--timeout", "0.2"])
        process.kill()
    assert result.exit_code == 1
    assert "has not ended within 0.2 s" in result.stderr


def test_nothing_runs(cli: CliRunner) -> None:
    result = cli.invoke(app, ["stop"])
    assert result.exit_code == 1
    assert "no deployment of yours runs here" in result.stderr


def test_another_process_with_the_same_pid_is_left_alone(
    cli: CliRunner, sleeper: subprocess.Popen[bytes], run_folder: Path
) -> None:
    dataclasses.replace(run_of(sleeper.pid), started=1.0).write()
    assert cli.invoke(app, ["stop"]).exit_code == 1
    assert sleeper.poll() is None
    assert not list(run_folder.iterdir())


def test_several_are_told_apart_by_port(cli: CliRunner, sleeper: subprocess.Popen[bytes]) -> None:
    run_of(sleeper.pid, 8000)
    run_of(sleeper.pid, 8100)
    result = cli.invoke(app, ["stop"])
    assert result.exit_code == 2
    assert "HTTP ports 8000, 8100" in result.stderr
    assert find_run(8100).http_port == 8100


def test_a_file_that_is_none_of_ours_is_passed_over(run_folder: Path) -> None:
    run_folder.mkdir(parents=True)
    (run_folder / "8000.json").write_text("{")
    (run_folder / "8001.json").write_text('{"pid": 1}')
    assert live_runs() == []
