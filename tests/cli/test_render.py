"""`herder render`: what it prints and writes; and the checked-in manifests, which are its output."""

from __future__ import annotations

import json
import shlex
from itertools import product
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cli.render import app

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted((ROOT / "k8s" / "overlays").iterdir())


def files_under(folder: Path) -> dict[Path, str]:
    return {path.relative_to(folder): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_checked_in_manifests_are_its_output(
    cli: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each overlay says the command that makes it. If this fails: run these commands again (`make k8s`)."""
    monkeypatch.chdir(ROOT)
    assert len(OVERLAYS) == 3
    for overlay in OVERLAYS:
        first, _, _ = (overlay / "kustomization.yaml").read_text().partition("\n")
        herder, render, *arguments = shlex.split(first.removeprefix("# Made by: "))
        assert (herder, render) == ("herder", "render")
        result = cli.invoke(app, [*arguments, "--out", str(tmp_path)])
        assert result.exit_code == 0, result.stderr
    assert files_under(tmp_path) == files_under(ROOT / "k8s")


def test_a_second_time_changes_nothing(cli: CliRunner, config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "k8s"
    command = ["k8s", str(config_file), "--out", str(out), "--set", "experts.actors=4", "--no-vision"]
    assert cli.invoke(app, command).exit_code == 0
    before = {path: (path.stat().st_mtime_ns, text) for path, text in files_under(out).items() for path in [out / path]}
    assert cli.invoke(app, command).exit_code == 0
    after = {path: (path.stat().st_mtime_ns, text) for path, text in files_under(out).items() for path in [out / path]}
    assert after == before
    made_by = (out / "overlays" / "deployment" / "loader.yaml").read_text().splitlines()[0]
    assert made_by == f"# Made by: herder render k8s {config_file} --set experts.actors=4 --no-vision"


def test_an_overlay_leaves_the_others_alone(cli: CliRunner, config_file: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert cli.invoke(app, ["k8s", str(config_file), "--out", str(tmp_path), "--overlay", name]).exit_code == 0
    assert {path.name for path in (tmp_path / "overlays").iterdir()} == {"one", "two"}


def test_serve_prints_what_serve_deploy_takes(cli: CliRunner, config_file: Path, checkpoint: Path) -> None:
    result = cli.invoke(app, ["serve", str(config_file), "--set", "gateway.replicas=2", "--model", str(checkpoint)])
    assert result.exit_code == 0, result.stderr
    [application] = yaml.safe_load(result.stdout)["applications"]
    assert application["import_path"] == "actors.serve_app:build"
    assert application["args"]["model"]["path"] == str(checkpoint)
    assert application["deployments"][0]["num_replicas"] == 2


def test_the_checkpoint_says_whether_it_sees(cli: CliRunner, config_file: Path, tmp_path: Path) -> None:
    """The little one has no vision encoder; one that is not here is taken for one of Llama 4's own."""
    for extra, seen in (([], False), (["--vision"], True), (["--set", "model.path=/elsewhere/scout"], True)):
        out = tmp_path / f"k8s-{len(extra)}"
        assert cli.invoke(app, ["k8s", str(config_file), "--out", str(out), *extra]).exit_code == 0
        service = yaml.safe_load((out / "overlays" / "deployment" / "rayservice.yaml").read_text())
        groups = [group["groupName"] for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]]
        assert ("vision" in groups) == seen


def test_the_dashboard_is_a_grid_of_panels_over_a_source_of_the_readers_choice(cli: CliRunner) -> None:
    printed = cli.invoke(app, ["grafana"]).stdout
    assert printed == (ROOT / "k8s" / "monitoring" / "herder-dashboard.json").read_text()
    dashboard = json.loads(printed)
    [source] = dashboard["templating"]["list"]
    assert (source["type"], source["query"]) == ("datasource", "prometheus")
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = set(product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])))
        assert max(x for x, _ in cells) < 24 and taken.isdisjoint(cells), panel["title"]
        taken |= cells
        assert panel["type"] == "row" or panel["datasource"]["uid"] == f"${{{source['name']}}}"
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    titles = {panel["title"]: panel["type"] for panel in dashboard["panels"]}
    assert titles["Load per expert"] == "heatmap"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["serve", "--set", "gateway.api_keys=[sesame]"], "gateway.api_keys must not be rendered into a file"),
        (["k8s", "--overlay", "Up/er"], "--overlay must be lower-case letters, digits and dashes, not Up/er"),
        (["k8s", "--image", "registry:5000/herder"], "--image must have the form NAME:TAG, not registry:5000/herder"),
        (["k8s", "--set", "engine.page_siz=1"], "engine.page_siz is not a known key; the nearest is engine.page_size"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    cli: CliRunner, config_file: Path, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    verb, *options = arguments
    out = ["--out", str(tmp_path / "k8s")] if verb == "k8s" else []
    result = cli.invoke(app, [verb, str(config_file), *options, *out])
    assert result.exit_code == 2
    assert sentence in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "k8s").exists()
