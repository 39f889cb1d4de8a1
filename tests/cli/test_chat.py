"""`herder chat` against a server of canned answers, over HTTP and gRPC."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from actors.image_fetch import read_data_url
from cli import chat, endpoint
from cli.main import app
from cli.report import CliError
from tests.cli.conftest import BREAKS, REFUSED, FakeServer, free_port


@pytest.fixture(params=["http", "grpc"])
def way(request: pytest.FixtureRequest, server: FakeServer) -> list[str]:
    return ["--url", server.url] if request.param == "http" else ["--grpc", "--url", server.address]


def test_one_question(cli: CliRunner, way: list[str]) -> None:
    result = cli.invoke(app, ["chat", "17+25=", *way])
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "42\n"


def test_the_running_deployment_is_found(cli: CliRunner, server: FakeServer, tmp_path: Path) -> None:
    server.run(tmp_path)
    assert cli.invoke(app, ["chat", "17+25="]).stdout == "42\n"
    assert cli.invoke(app, ["chat", "--grpc", "17+25="]).stdout == "42\n"


def test_one_that_still_starts_is_told(cli: CliRunner, server: FakeServer, tmp_path: Path) -> None:
    server.run(tmp_path, serving=False)
    result = cli.invoke(app, ["chat", "17+25="])
    assert result.exit_code == 1 and "is still starting" in result.stderr


def test_options_reach_the_server(cli: CliRunner, server: FakeServer) -> None:
    options = ["--system", "Be brief.", "--temperature", "0.5", "--max-tokens", "7", "--model", "little"]
    assert cli.invoke(app, ["chat", "Hi", "--url", server.url, *options]).exit_code == 0
    assert cli.invoke(app, ["chat", "Hi", "--grpc", "--url", server.address, *options]).exit_code == 0
    by_http, by_grpc = server.asked
    assert by_http["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert (by_http["temperature"], by_http["max_tokens"], by_http["model"]) == (0.5, 7, "little")
    assert [message.role for message in by_grpc.messages] == ["system", "user"]
    assert (by_grpc.sampling.temperature, by_grpc.sampling.max_tokens, by_grpc.model) == (0.5, 7, "little")


def test_unset_options_are_left_to_the_server(cli: CliRunner, server: FakeServer) -> None:
    cli.invoke(app, ["chat", "Hi", "--url", server.url])
    cli.invoke(app, ["chat", "Hi", "--grpc", "--url", server.address])
    by_http, by_grpc = server.asked
    assert "max_tokens" not in by_http and by_http["model"] == "little"
    assert not by_grpc.sampling.HasField("max_tokens") and by_grpc.sampling.HasField("temperature")


def test_a_refusal_is_the_servers_sentence(cli: CliRunner, way: list[str]) -> None:
    result = cli.invoke(app, ["chat", "Hi", "--temperature=-1", *way])
    assert result.exit_code == 1
    assert result.stderr == f"herder: {REFUSED}\n"
    assert result.stdout == ""


def test_a_failure_amid_the_answer(cli: CliRunner, way: list[str]) -> None:
    result = cli.invoke(app, ["chat", BREAKS, *way])
    assert result.exit_code == 1
    assert result.stdout == "well\n"
    assert result.stderr == "herder: an expert actor died\n"


def test_images_go_before_the_question(cli: CliRunner, server: FakeServer, tmp_path: Path) -> None:
    file, url = tmp_path / "dots.png", "https://example.org/a.png"
    file.write_bytes(b"\x89PNG")
    options = ["--image", str(file), "--image", url, "--system", "Be brief."]
    assert cli.invoke(app, ["chat", "17+25=", "--url", server.url, *options]).stdout == "42\n"
    assert cli.invoke(app, ["chat", "17+25=", "--grpc", "--url", server.address, *options]).stdout == "42\n"
    by_http, by_grpc = server.asked
    assert by_http["messages"][0]["content"] == "Be brief."
    first, second, text = by_http["messages"][1]["content"]
    assert read_data_url(first["image_url"]["url"]) == b"\x89PNG"
    assert second == {"type": "image_url", "image_url": {"url": url}}
    assert text == {"type": "text", "text": "17+25="}
    first, second, text = by_grpc.messages[1].content
    assert (first.image.data, second.image.url, text.text) == (b"\x89PNG", url, "17+25=")


def test_an_image_that_cannot_be_read(cli: CliRunner, way: list[str], server: FakeServer, tmp_path: Path) -> None:
    for where, reason in ((tmp_path / "none.png", "No such file or directory"), (tmp_path, "Is a directory")):
        result = cli.invoke(app, ["chat", "Hi", "--image", str(where), *way])
        assert (result.exit_code, result.stderr) == (2, f"herder: --image: {where} cannot be read ({reason})\n")
    assert server.asked == []


@pytest.mark.parametrize("flags", [[], ["--grpc"]])
def test_nobody_answers(cli: CliRunner, flags: list[str]) -> None:
    where = f"127.0.0.1:{free_port()}"
    result = cli.invoke(app, ["chat", "Hi", *flags, "--url", where])
    assert result.exit_code == 1
    assert "nothing answers at" in result.stderr and where in result.stderr


def test_the_prompt_may_come_through_a_pipe(cli: CliRunner, server: FakeServer) -> None:
    result = cli.invoke(app, ["chat", "--url", server.url], input="17+25=\n")
    assert result.stdout == "42\n"
    assert cli.invoke(app, ["chat", "--url", server.url], input=" \n").exit_code == 2


def test_a_conversation_remembers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = iter(["one", "fail", "cut", "two", ""])
    asked: list[list[str]] = []
    shown: list[list[int]] = []

    def ask(messages: Any) -> Iterator[str]:
        asked.append([message.text for message in messages])
        shown.append([len(message.images) for message in messages])
        match messages[-1].text:
            case "fail":
                raise CliError("no room")
            case "cut":
                yield "ha"
                raise KeyboardInterrupt
        yield "yes"

    monkeypatch.setattr(builtins, "input", lambda _: next(said))
    chat.converse(ask, [endpoint.Message("system", "s")], (b"png", "http://a/b"))
    assert asked[-1] == ["s", "one", "yes", "two"]
    assert shown[-1] == [0, 2, 0, 0]
    printed = capsys.readouterr()
    assert printed.out == "yes\nha\nyes\n"
    assert "herder: no room" in printed.err


def test_a_stream_that_just_ends_is_a_fault() -> None:
    assert list(endpoint.sse_text([": comment", "", 'data: {"choices": []}', "data: [DONE]"])) == []
    with pytest.raises(CliError, match="closed the stream before its end"):
        list(endpoint.sse_text(["data: {}"]))
