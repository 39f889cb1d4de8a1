"""`herder status` against a control service of canned answers."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from cli.main import app
from tests.cli.conftest import FakeServer, free_port


def test_tables(cli: CliRunner, server: FakeServer, tmp_path: Path) -> None:
    server.run(tmp_path)
    result = cli.invoke(app, ["status"])
    assert result.exit_code == 0, result.stderr
    lines = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line.strip()}
    assert lines["herder"] == ["herder", "0.1.0,", "epoch", "3:", "ready"]
    assert lines["expert-1"][:6] == ["expert-1", "expert", "1", "10.0.0.7", "4711", "cpu"]
    numbers = ["5", "0", "1,234", "0", "77", "0", "2"]
    assert lines["attention-0"] == ["attention-0", *numbers, "full", "25%", "(cached", "50%)"]
    assert lines["1"] == ["1", "4,000", "0@0+1", "75%", "1@1", "25%", "0@0+1", "75%", "1@1", "25%"]


def test_json(cli: CliRunner, server: FakeServer) -> None:
    result = cli.invoke(app, ["status", "--json", "--url", server.address])
    found = json.loads(result.stdout)
    assert found["server"]["ready"] is True
    assert found["load"]["engines"][0]["waiting"] == 0
    assert found["placement"]["layers"][0]["experts"][0]["slots"] == [0, 1]


def test_nobody_answers(cli: CliRunner) -> None:
    where = f"127.0.0.1:{free_port()}"
    result = cli.invoke(app, ["status", "--url", where])
    assert result.exit_code == 1
    assert result.stderr == f"herder: nothing answers at {where}\n"
