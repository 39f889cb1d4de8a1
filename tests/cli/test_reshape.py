"""`herder scale`, `move` and `rebalance` against a control service that notes what it was asked."""

from __future__ import annotations

import pytest
from google.protobuf.message import Message
from typer.testing import CliRunner

from cli.main import app
from herder.v1 import control_pb2 as pb
from tests.cli.conftest import HELD, FakeServer, free_port


@pytest.mark.parametrize(
    ("words", "request_", "said"),
    [
        ("scale experts 4", pb.ScaleExpertsRequest(actors=4), "4 expert actors serve"),
        ("scale attention 1", pb.ScaleAttentionRequest(actors=1), "1 attention actor serves"),
        ("move 5 --to 2", pb.MoveExpertRequest(expert=5, to_slot=2), "slot 2 has expert 5"),
        (
            "move 0 --to 0 --layer 0 --from 0",
            pb.MoveExpertRequest(expert=0, to_slot=0, layer=0, from_slot=0),
            "slot 0 has expert 0 of layer 0",
        ),
    ],
)
def test_changes(cli: CliRunner, server: FakeServer, words: str, request_: Message, said: str) -> None:
    result = cli.invoke(app, [*words.split(), "--url", server.address])
    assert (result.exit_code, server.asked) == (0, [request_])
    assert result.stderr.startswith(f"{said} (epoch 3, ")


def test_rebalance(cli: CliRunner, server: FakeServer) -> None:
    said = [cli.invoke(app, ["rebalance", "--url", server.address]).stderr for _ in range(2)]
    assert said[0].startswith("experts have moved: the busiest slot has 1.25 x the mean load (2.50 before; epoch 3, ")
    assert said[1] == "nothing to move: the busiest slot has 1.25 x the mean load\n"


def test_a_refusal_is_the_servers_sentence(cli: CliRunner, server: FakeServer) -> None:
    result = cli.invoke(app, ["move", "5", "--to", "9", "--url", server.address])
    assert (result.exit_code, result.stderr) == (1, f"herder: {HELD}\n")


@pytest.mark.parametrize("words", ["scale gateways 2", "scale experts 0", "move 5", "move -1 --to 2", "move 5 --to x"])
def test_what_cannot_be_asked(cli: CliRunner, server: FakeServer, words: str) -> None:
    assert cli.invoke(app, [*words.split(), "--url", server.address]).exit_code == 2
    assert server.asked == []


@pytest.mark.parametrize("words", ["scale experts 2", "move 5 --to 2", "rebalance", "drain 1"])
def test_nobody_answers(cli: CliRunner, words: str) -> None:
    where = f"127.0.0.1:{free_port()}"
    result = cli.invoke(app, [*words.split(), "--url", where])
    assert (result.exit_code, result.stderr) == (1, f"herder: nothing answers at {where}\n")
