"""`herder eval` against a server of canned answers."""

from __future__ import annotations

import base64
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.eval import read_questions
from cli.main import app
from herder.v1 import inference_pb2
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


IMAGES = [b"\x89PNG one", b"\x89PNG two"]


@pytest.fixture
def with_images(data: Path) -> Path:
    """The questions of `data`, and one that shows two images."""
    images = [base64.b64encode(image).decode() for image in IMAGES]
    line = json.dumps({"task": "compare", "prompt": "Which one?", "answer": "well", "images": images})
    data.write_text(data.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    return data


def shown_over_http(body: dict[str, Any]) -> tuple[list[bytes], str]:
    """The images that a request shows, and the text after them."""
    *images, text = body["messages"][0]["content"]
    assert all(part["type"] == "image_url" for part in images)
    return [urllib.request.urlopen(part["image_url"]["url"]).read() for part in images], text["text"]


def shown_over_grpc(request: inference_pb2.ChatRequest) -> tuple[list[bytes], str]:
    *images, text = request.messages[0].content
    return [part.image.data for part in images], text.text


@pytest.mark.parametrize(("flags", "shown"), [([], shown_over_http), (["--grpc"], shown_over_grpc)])
def test_images_are_shown(
    cli: CliRunner,
    server: FakeServer,
    with_images: Path,
    flags: list[str],
    shown: Callable[[Any], tuple[list[bytes], str]],
) -> None:
    server.run(with_images.parent)
    cli.invoke(app, ["eval", "--task", "vision", *flags])
    assert [shown(request) for request in server.asked] == [(IMAGES, "Which one?")]


@pytest.mark.parametrize(
    ("tasks", "asked"),
    [(["text"], 3), (["vision"], 1), (["vision", "reverse"], 2), (["vision", "compare"], 1), ([], 4)],
)
def test_task_picks_kinds_as_well(with_images: Path, tasks: list[str], asked: int) -> None:
    assert len(read_questions(with_images, tasks)) == asked


def test_a_server_that_does_not_answer_ends_it(cli: CliRunner, data: Path) -> None:
    where = f"127.0.0.1:{free_port()}"
    for flags in ([], ["--grpc"]):
        result = cli.invoke(app, ["eval", "--url", where, "--data", str(data), *flags])
        assert result.exit_code == 1
        assert "nothing answers at" in result.stderr


@pytest.mark.parametrize(
    ("text", "flags", "sentence"),
    [
        ("{}", [], ":1: must be a JSON object with task, prompt, answer"),
        ("[]", [], ":1: must be a JSON object with task, prompt, answer"),
        ('{"task": "a", "prompt": "b", "answer": "c", "images": ["no base64!"]}', [], "images in base64"),
        ("", [], "holds no question"),
        ('{"task": "a", "prompt": "b", "answer": "c"}', ["--task", "x"], "has no task 'x'; it has a, text"),
        ('{"task": "a", "prompt": "b", "answer": "c"}', ["--task", "vision"], "has no task 'vision'; it has a, text"),
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
