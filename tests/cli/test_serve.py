"""`herder serve` over a launch of the test's own: order, run file, signals, faults. The real one is in tests/actors."""

from __future__ import annotations

import io
import json
import signal
import socket
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cli.main import app
from cli.progress import LoadProgress
from cli.serve import cause, program, reachable


class FakeDeployment:
    http_url = "http://127.0.0.1:1"
    grpc_address = "127.0.0.1:2"

    def __init__(self, on_wait: Callable[[], None]) -> None:
        self._on_wait = on_wait
        self.stops = 0
        self.drains: list[float] = []
        self.remaining = 0

    def wait(self) -> None:
        self._on_wait()

    def drain(self, timeout_s: float) -> int:
        assert self.stops == 0
        self.drains.append(timeout_s)
        if self.remaining:
            signal.raise_signal(signal.SIGINT)
        return self.remaining

    def stop(self, keep_logs: bool = False) -> Path | None:
        self.stops += 1
        return Path("/ray/session") if keep_logs else None


def install(monkeypatch: pytest.MonkeyPatch, launch: Callable[..., Any]) -> None:
    module = types.ModuleType("actors.deployment")
    module.launch = launch  # type: ignore[attr-defined]
    module.Deployment = FakeDeployment  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "actors.deployment", module)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_a_signal(
    cli: CliRunner,
    config_file: Path,
    run_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    seen: list[Any] = []

    def until_signal() -> None:
        (run_file,) = run_folder.glob("*.json")
        seen.append(json.loads(run_file.read_text()))
        signal.raise_signal(number)

    deployment = FakeDeployment(until_signal)

    def launch(config: Any, address: str | None, on_progress: Callable[[str, int, int], None]) -> FakeDeployment:
        (run_file,) = run_folder.glob("*.json")
        seen.append(json.loads(run_file.read_text()))
        on_progress("attention-0", 50, 100)
        on_progress("attention-0", 100, 100)
        # As ray.init does.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return deployment

    install(monkeypatch, launch)
    before = signal.getsignal(number)
    result = cli.invoke(app, ["serve", str(config_file)])
    assert result.exit_code == 0, result.stderr
    assert (deployment.drains, deployment.stops) == ([30.0], 1)
    starting, serving = seen
    assert not starting["serving"]
    assert serving["serving"] and serving["http_url"] == deployment.http_url
    assert not list(run_folder.iterdir())
    assert "attention-0: loaded 100 bytes of 100 bytes" in result.stderr
    assert f'{program()} chat "17+25="' in result.stdout
    assert f"curl {deployment.http_url}/v1/chat/completions" in result.stdout
    assert "logs" not in result.stderr
    assert signal.getsignal(number) == before


def test_a_second_signal_does_not_disturb_the_stop(
    cli: CliRunner, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []

    def launch(config: Any, **_: Any) -> FakeDeployment:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            ended.append("torn down")
        raise AssertionError

    install(monkeypatch, launch)
    result = cli.invoke(app, ["serve", str(config_file)])
    assert result.exit_code == 0
    assert ended == ["torn down"]


def test_a_second_signal_cuts_draining_short(
    cli: CliRunner, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = FakeDeployment(lambda: signal.raise_signal(signal.SIGTERM))
    deployment.remaining = 1
    install(monkeypatch, lambda config, **_: deployment)
    result = cli.invoke(app, ["serve", str(config_file), "--set", "gateway.drain_timeout_s=7"])
    assert result.exit_code == 0
    assert (deployment.drains, deployment.stops) == ([7.0], 1)
    assert "have not ended" not in result.stderr


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("gateway.api_keys_file=/nowhere", "gateway.api_keys_file: /nowhere cannot be read"),
        ("gateway.grpc={mode: standalone, tls: {cert: /no, key: /no}}", "gateway.grpc.tls.key: there is no file /no"),
        ("gateway.grpc.tls={cert: /no, key: /no}", "gateway.grpc.tls needs gateway.grpc.mode to be standalone"),
        ("gateway.api_keys=['']", "gateway.api_keys must not hold an empty key"),
    ],
)
def test_gateway_files_are_looked_at_before_anything_starts(
    cli: CliRunner, config_file: Path, setting: str, said: str
) -> None:
    result = cli.invoke(app, ["serve", str(config_file), "--set", setting])
    assert result.exit_code == 2
    assert said in result.stderr


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://0.0.0.0:8000", "http://127.0.0.1:8000"),
        ("0.0.0.0:9000", "127.0.0.1:9000"),
        ("http://10.0.0.7:8000", "http://10.0.0.7:8000"),
    ],
)
def test_an_address_for_all_interfaces_is_told_as_one_to_ask(url: str, local: str) -> None:
    assert reachable(url) == local


def test_ports_come_from_the_options(cli: CliRunner, config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def launch(config: Any, **_: Any) -> FakeDeployment:
        seen.append(config)
        return FakeDeployment(lambda: None)

    install(monkeypatch, launch)
    options = ["--http-port", "18123", "--set", "gateway.http_port=1", "--address", "auto"]
    assert cli.invoke(app, ["serve", str(config_file), *options]).exit_code == 0
    assert seen[0].gateway.http_port == 18123


@pytest.mark.parametrize("port", ["http_port", "grpc_port"])
def test_a_port_in_use_is_named(cli: CliRunner, config_file: Path, port: str) -> None:
    number = json.loads(config_file.read_text())["gateway"][port]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", number))
        taken.listen()
        result = cli.invoke(app, ["serve", str(config_file)])
    assert result.exit_code == 2
    assert f"gateway.{port}: port {number} on 127.0.0.1 is in use" in result.stderr


def test_a_start_that_fails_is_one_sentence(
    cli: CliRunner, config_file: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(config: Any, **_: Any) -> FakeDeployment:
        raise TimeoutError("expert-1 did not load within 60 s\nand a traceback")

    install(monkeypatch, launch)
    result = cli.invoke(app, ["serve", str(config_file)])
    assert result.exit_code == 1
    assert result.stderr == "herder: it did not start: expert-1 did not load within 60 s\n"
    assert not list(run_folder.iterdir())


def test_a_deployment_that_fails_is_stopped(cli: CliRunner, config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("expert-1 died")

    deployment = FakeDeployment(fail)
    install(monkeypatch, lambda config, **_: deployment)
    result = cli.invoke(app, ["serve", str(config_file)])
    assert result.exit_code == 1
    assert "the deployment failed: expert-1 died" in result.stderr
    assert "/ray/session/logs" in result.stderr
    assert deployment.stops == 1


def test_the_program_is_called_as_the_shell_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = tmp_path / "herder"
    called.write_text("#!/bin/sh\n")
    called.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(called), "serve"])
    monkeypatch.setenv("PATH", "")
    assert program() == str(called)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert program() == "herder"


def test_the_cause_behind_rays_errors_is_told() -> None:
    class Wrapped(Exception):
        cause = ValueError("the shard is truncated")

    assert cause(Wrapped("a remote traceback")) == "the shard is truncated"
    assert cause(KeyError()) == "KeyError"


def test_loading_shows_a_bar_per_actor_in_a_terminal() -> None:
    text = io.StringIO()
    with LoadProgress(Console(file=text, force_terminal=True, width=120)) as progress:
        progress("attention-0", 50, 100)
        progress("expert-0", 100, 100)
    assert "attention-0" in text.getvalue() and "expert-0" in text.getvalue()


def test_plain_lines_come_at_each_quarter() -> None:
    text = io.StringIO()
    with LoadProgress(Console(file=text, force_terminal=False, width=120)) as progress:
        for done in range(101):
            progress("expert-0", done, 100)
    assert len(text.getvalue().splitlines()) == 5


def test_a_dry_run_starts_nothing(cli: CliRunner, config_file: Path) -> None:
    result = cli.invoke(app, ["serve", str(config_file), "--dry-run"])
    assert result.exit_code == 0, result.stderr
    assert result.stdout == cli.invoke(app, ["validate", str(config_file)]).stdout
