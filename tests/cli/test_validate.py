"""`herder validate`, and what it and `herder serve` say about each kind of bad input."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from cli.main import app
from cluster.plan_units import count


def test_it_tells_what_would_be_served(cli: CliRunner, config_file: Path, checkpoint: Path) -> None:
    result = cli.invoke(app, ["validate", str(config_file)])
    assert result.exit_code == 0, result.stderr
    assert "2, of which 1 have 4 experts (top 1)" in result.stdout
    assert "2 actors on cpu: 2 experts of each layer each" in result.stdout
    assert "128 tokens" in result.stdout
    stored = load_file(checkpoint / "model.safetensors")
    routed = sum(tensor.numel() for name, tensor in stored.items() if ".experts." in name)
    total = sum(tensor.numel() for tensor in stored.values())
    assert f"{count(total)}, of which {count(routed)} in routed experts" in result.stdout
    assert f"{count(total - routed)} parameters and KV" in result.stdout


def test_replicas_and_uneven_splits_show(cli: CliRunner, config_file: Path) -> None:
    result = cli.invoke(app, ["validate", str(config_file), "--set", "experts.per_actor=3"])
    assert "3 experts of each layer" in result.stdout and "1.5 copies of an expert on average" in result.stdout
    result = cli.invoke(app, ["validate", str(config_file), "--set", "experts.actors=3"])
    assert "1 to 2 experts of each layer" in result.stdout


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        (
            "engine.max_batch_token=1",
            "engine.max_batch_token is not a known key; the nearest is engine.max_batch_tokens",
        ),
        ("experts.per_actor=5", "experts.per_actor (5) must be at most the 4 experts of a layer"),
        ("experts.per_actor=1", "experts.actors (2) must be at least 4"),
        ("model.max_context=256", "model.max_context (256) must be at most the checkpoint's 128"),
        ("model.path=/nowhere", "model.path: there is no directory /nowhere"),
        ("engine", "--set engine: must have the form key=value"),
    ],
)
@pytest.mark.parametrize("verb", ["validate", "serve"])
def test_bad_input_is_one_sentence_and_exit_code_2(
    cli: CliRunner, config_file: Path, verb: str, setting: str, sentence: str
) -> None:
    result = cli.invoke(app, [verb, str(config_file), "--set", setting])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert sentence in result.stderr


def test_a_truncated_shard_is_named(cli: CliRunner, config_file: Path, checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    result = cli.invoke(app, ["validate", str(config_file), "--model", str(broken)])
    assert result.exit_code == 2
    assert "model.path:" in result.stderr and "model.safetensors" in result.stderr


def test_a_missing_checkpoint_file_is_named(
    cli: CliRunner, config_file: Path, checkpoint: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "with: a colon"
    empty.mkdir()
    shutil.copy(checkpoint / "config.json", empty)
    result = cli.invoke(app, ["validate", str(config_file), "--model", str(empty)])
    assert result.exit_code == 2
    assert "model.safetensors" in result.stderr
