"""`herder plan`: what it prints, its JSON, its picture, and what it says about bad input."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from cluster.plan_report import Comparison, DeploymentPlan
from tests.imports import loaded_by

ROOT = Path(__file__).parents[2]


def test_scout_is_told_in_tables(cli: CliRunner) -> None:
    result = cli.invoke(app, ["plan", "scout", "--machine", "h100", "--batch", "64"])
    assert result.exit_code == 0, result.stderr
    for figure in (
        "217.3 GB",  # all of it in BF16
        "54.3 GB",  # and in INT4
        "15.8% of all",
        "0.25 GFLOPs per token, each",
        "492.7 GB",  # KV of ten million tokens
        "1.97 TB",  # if every layer kept it
        "20.5 kB per token and MoE layer",
        "8 devices on 1 node, 4 for attention and 4 for experts",
        "a batch of 4,725 brings",
        "10% of a device's memory is kept",
    ):
        assert figure in result.stdout, figure


def test_neither_torch_nor_ray_is_loaded() -> None:
    """Or it would take many seconds."""
    plan = "from cli.main import app; app(['plan', 'scout'], standalone_mode=False)"
    assert not loaded_by(plan, "torch", "ray", "transformers", "matplotlib")


def test_json_is_the_report(cli: CliRunner) -> None:
    result = cli.invoke(
        app,
        ["plan", "maverick", "--machine", "H200", "--nodes", "4", "--precision", "fp8", "--context", "128k", "--json"],
    )
    planned = DeploymentPlan.model_validate_json(result.stdout)
    assert (planned.version, planned.model, planned.machine.name, planned.precision) == (1, "maverick", "h200", "fp8")
    assert planned.context == 128_000 and planned.layout and planned.layout.devices == 32


def test_models_side_by_side(cli: CliRunner) -> None:
    names = ["scout", "maverick", "mixtral-8x7b", "deepseek-v3"]
    result = cli.invoke(app, ["plan", "--compare", *names])
    assert result.exit_code == 0, result.stderr
    rows = {line[:30].strip(): " ".join(line[30:].split()) for line in result.stdout.splitlines()}
    assert rows["parameters"] == "108.6 B 401.6 B 46.7 B 671.0 B"
    assert rows["active share"] == "15.8% 4.3% 27.6% 5.6%"
    assert rows["attention + expert devices"] == "1 + 4 1 + 12 1 + 2 1 + 19"
    result = cli.invoke(app, ["plan", "--compare", *names, "--json"])
    assert [one.model for one in Comparison.model_validate_json(result.stdout).plans] == names


@pytest.mark.parametrize(
    ("name", "machine", "attention", "experts"),
    [
        ("scout_8xh100", "h100", 4, (4,) * 4),
        ("maverick_4x8h100", "h100", 16, (8,) * 16),
        ("tiny_cpu", "cpu", 2, (8, 8)),
        ("tiny_failover", "cpu", 2, (8,) * 4),
    ],
)
def test_a_configurations_actors(
    cli: CliRunner, name: str, machine: str, attention: int, experts: tuple[int, ...]
) -> None:
    result = cli.invoke(app, ["plan", "--config", str(ROOT / "configs" / f"{name}.yaml"), "--json"])
    planned = DeploymentPlan.model_validate_json(result.stdout)
    assert planned.machine.name == machine and planned.layout and planned.misfit is None
    assert planned.layout.attention.actors == attention and planned.layout.experts_per_actor == experts


def test_a_configurations_keys_can_be_changed(cli: CliRunner, config_file: Path, checkpoint: Path) -> None:
    result = cli.invoke(app, ["plan", "--config", str(config_file), "--set", "experts.actors=3"])
    assert "3 actors with 1 to 2 of each layer" in result.stdout
    result = cli.invoke(app, ["plan", "--config", str(config_file), "--set", "experts.per_actor=5"])
    assert result.exit_code == 2 and "at most the 4 experts of a layer" in result.stderr
    assert "128 tokens" in cli.invoke(app, ["plan", str(checkpoint)]).stdout


@pytest.mark.parametrize("model", ["scout", "llama-3.1-405b"])  # the latter fits in no layout
def test_a_picture(cli: CliRunner, tmp_path: Path, model: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    result = cli.invoke(app, ["plan", model, "--plot", str(path)])
    assert result.exit_code == 0, result.stderr
    assert path.read_bytes().startswith(b"\x89PNG")
    result = cli.invoke(app, ["plan", model, "--plot", str(tmp_path / "plan.txt")])
    assert result.exit_code == 2 and "plan.txt cannot be written" in result.stderr


def test_a_picture_needs_matplotlib(cli: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cli.plan_plot", raising=False)
    for name in ("matplotlib", "matplotlib.axes"):
        monkeypatch.setitem(sys.modules, name, None)
    result = cli.invoke(app, ["plan", "scout", "--plot", str(tmp_path / "plan.png")])
    assert result.exit_code == 2 and "pip install 'herder[plot]'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "name a MODEL"),
        (["scot"], "the nearest is scout"),
        (["scout", "maverick"], "several models need --compare"),
        (["scout", "--machine", "h10"], "--machine must be one of h100, h200, b200, a100, cpu, not 'h10'"),
        (["scout", "--precision", "fp4"], "--precision must be one of fp32, bf16, fp8, int8, int4, not 'fp4'"),
        (["scout", "--context", "many"], "--context must be a number of tokens"),
        (["scout", "--context", "0"], "--context must be a number of tokens"),
        (["mixtral-8x7b", "--context", "1M"], "--context must be at most the 32,768 of mixtral-8x7b"),
        (["scout", "--set", "experts.actors=3"], "--set needs --config"),
        (["--config", "c.yaml", "--gpus", "8"], "--gpus does not go with --config"),
        (["--config", str(ROOT / "configs" / "tiny_cpu.yaml"), "--machine", "h100"], "asks for no GPUs"),
        (["--compare", "scout", "--plot", "p.png"], "--compare does not go with --plot"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml: cannot be read"),
    ],
)
def test_bad_input_is_one_sentence(cli: CliRunner, arguments: list[str], sentence: str) -> None:
    result = cli.invoke(app, ["plan", *arguments])
    assert result.exit_code == 2 and result.stdout == ""
    assert sentence in result.stderr and len(result.stderr.splitlines()) == 1
