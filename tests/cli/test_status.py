"""`herder status` against a control service of canned answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli import status
from cli.main import app
from herder.v1 import control_pb2 as pb
from tests.cli.conftest import FakeServer, free_port


def test_tables(cli: CliRunner, server: FakeServer, tmp_path: Path) -> None:
    server.run(tmp_path)
    result = cli.invoke(app, ["status"])
    assert result.exit_code == 0, result.stderr
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[:3] == [
        "herder 0.1.0, epoch 3: ready",
        "6 failovers, 4 requests parked",
        "balance manual: busiest slot 1.25 x the mean; 2.50 before the move 12 s ago",
    ]
    assert "expert-1 10.0.0.7 4711 cpu 2.5 MB 300.0 MB serving" in lines
    assert "attention-0 5 4 0 1,234 25% + 50%" in lines
    assert "attention-0 0 0 77 0 2" in lines
    assert "0 1 1,500 38%" in lines and "1 2 2,500 62%" in lines
    assert "1 4,000 0@0+1 75% 1@1 25%" in lines


def test_it_fits_80_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    experts = [pb.ExpertPlacement(expert=i, slots=[i % 16, i % 15], tokens=10**8 * (i + 1)) for i in range(128)]
    actor = pb.ActorInfo(name="attention-0", node_ip="192.168.100.100", pid=4_194_304, device="cuda:0", state="serving")
    actor.loaded_bytes = actor.rss_bytes = 123_400_000_000
    kinds = [pb.KvPages(layer_kind=kind, used=9, total=10, cached=1) for kind in ("full", "chunked")]
    engine = pb.EngineLoad(actor="attention-0", running=128, waiting=1024, generated_tokens=10**9, kv_pages=kinds)
    found = status.Status(
        pb.GetServerInfoResponse(version="0.1.0", actors=[actor], reason="loading weights"),
        pb.GetLoadResponse(engines=[engine]),
        pb.GetExpertPlacementResponse(layers=[pb.LayerExperts(layer=47, experts=experts)]),
    )
    status.show(found)
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text  # which is how rich cuts a cell off
    assert "127@15+7" in text and "0@0+0" in text and "60@12+0" not in text


def test_before_there_is_any_load() -> None:
    assert status.balance(pb.GetExpertPlacementResponse(balance_mode=pb.BALANCE_MODE_OFF)) == "balance off: no load yet"


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
