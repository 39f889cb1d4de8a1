"""`herder eval` against a server of canned answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from tests.cli.conftest import FakeServer, free_port

QUESTIONS = [("addition", "17+25=", "42"), ("reverse", "Reverse cat", "tac"), ("addition", "2+2=", "4")]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "eval.jsonl"
    lines = [json.dumps({"task": task, "prompt": prompt, "answer": answer}) for task, prompt, answer in QUESTIONS]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("flags", [[], ["--grpc"]])
def test_accuracy_per_task(cli: CliRunner, server: FakeServer, data: Path, flags: list[str]) -> None:
    server.run(data.parent)
    result = cli.invoke(app, ["eval", *flags])
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line.strip()}
    assert rows["addition"] == ["1", "2", "50.0%"]
    assert rows["reverse"] == ["1", "1", "100.0%"]
    assert rows["all"] == ["2", "3", "66.7%"]
    assert result.exit_code == 1
    assert "below 95%: addition" in result.stderr
    assert len(server.asked) == 3


def test_good_enough(cli: CliRunner, server: FakeServer, data: Path) -> None:
    options = ["eval", "--url", server.url, "--data", str(data)]
    assert cli.invoke(app, [*options, "--min-accuracy", "0.5"]).exit_code == 0
    server.asked.clear()
    assert cli.invoke(app, [*options, "--task", "reverse", "--concurrency", "1"]).exit_code == 0
    assert [body["temperature"] for body in server.asked] == [0.0]


def test_a_server_that_does_not_answer_ends_it(cli: CliRunner, data: Path) -> None:
    where = f"127.0.0.1:{free_port()}"
    for flags in ([], ["--grpc"]):
        result = cli.invoke(app, ["eval", "--url", where, "--data", str(data), *flags])
        assert result.exit_code == 1
        assert "nothing answers at" in result.stderr


@pytest.mark.parametrize(
    ("text", "flags", "sentence"),
    [
        ("{}", [], ":1: must be a JSON object with task, prompt and answer"),
        ("", [], "holds no question"),
        ('{"task": "a", "prompt": "b", "answer": "c"}', ["--task", "x"], "has no task 'x'; it has a"),
    ],
)
def test_bad_questions(cli: CliRunner, tmp_path: Path, text: str, flags: list[str], sentence: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(text, encoding="utf-8")
    result = cli.invoke(app, ["eval", "--url", "127.0.0.1:1", "--data", str(path), *flags])
    assert result.exit_code == 2
    assert sentence in result.stderr


def test_no_data(cli: CliRunner, server: FakeServer, tmp_path: Path) -> None:
    server.run(tmp_path / "nowhere")
    result = cli.invoke(app, ["eval"])
    assert result.exit_code == 2
    assert "eval.jsonl cannot be read" in result.stderr


def test_help_lists_the_verbs(cli: CliRunner) -> None:
    text = cli.invoke(app, ["--help"]).stdout
    assert all(verb in text for verb in ("serve", "chat", "status", "eval", "validate", "stop"))
    for verb in ("serve", "chat", "status", "eval", "validate", "stop"):
        result = cli.invoke(app, [verb, "--help"])
        assert result.exit_code == 0 and f"herder {verb}" in result.stdout
