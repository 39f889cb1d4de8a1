"""`herder render`: the files of other tools, from a configuration where they depend on one."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from cli.report import CliError, err, verb
from cli.validate import ConfigPath, ModelDir, Settings
from cluster.config import DeploymentConfig, load_config

app = typer.Typer(help="Write files for Ray Serve, Kubernetes or Grafana.", no_args_is_help=True)


@app.command()
@verb
def serve(config: ConfigPath, model: ModelDir = None, settings: Settings = None) -> None:
    """Print a Serve configuration, for `serve deploy` on a running Ray cluster.

    Paths in it are those of this machine; every node needs the same.

    Examples:

        herder render serve configs/tiny_cpu.yaml > serve.yaml

        serve deploy serve.yaml
    """
    from cluster.manifests import to_yaml
    from cluster.manifests_serve import serve_config

    given = [*(settings or ()), *([] if model is None else [f"model.path={json.dumps(str(model.resolve()))}"])]
    typer.echo(to_yaml([serve_config(load_config(config, given))]), nl=False)


@app.command()
@verb
def grafana() -> None:
    """Print a dashboard for Grafana, over a Prometheus that scrapes Ray. Its data source is chosen in it.

    Examples:

        herder render grafana > herder-dashboard.json
    """
    from cluster.grafana import dashboard

    typer.echo(dashboard(), nl=False)


@app.command()
@verb
def k8s(
    context: typer.Context,
    config: ConfigPath,
    settings: Settings = None,
    out: Annotated[Path, typer.Option(help="The directory that gets base/ and overlays/.")] = Path("k8s"),
    overlay: Annotated[
        str | None, typer.Option(help="The overlay's name; without it, the configuration file's.", show_default=False)
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            help="Where the weights come from: a Hugging Face repository, or a directory of the image. Without it, "
            "meta-llama's of the model's name.",
            show_default=False,
        ),
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="NAME:TAG. Without it, herder:VERSION-cuda or -cpu.", show_default=False)
    ] = None,
    memory_gib: Annotated[int, typer.Option(min=1, help="Host memory for each actor.")] = 32,
    weights_gib: Annotated[int, typer.Option(min=1, help="The volume of the weights.")] = 300,
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 8,
    vision: Annotated[
        bool | None,
        typer.Option(
            "--vision/--no-vision",
            help="Whether the checkpoint has a vision encoder. Without it: as the checkpoint says, if it is here.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a kustomize base and an overlay for a Kubernetes cluster with KubeRay.

    Each file says how it was made; doing it again changes nothing.

    Examples:

        herder render k8s configs/scout_8xh100.yaml --overlay scout-1x8h100

        kubectl apply -k k8s/overlays/scout-1x8h100
    """
    from cluster.manifests import render
    from cluster.manifests_ray import Target

    deployment = load_config(config, settings or ())
    target = Target(
        source=source or f"meta-llama/{deployment.model.path.name}",
        image=image or _image(deployment),
        memory_gib=memory_gib,
        weights_gib=weights_gib,
        gpus_per_node=gpus_per_node,
        vision=_has_vision(deployment) if vision is None else vision,
    )
    name = overlay or config.stem.replace("_", "-").lower()
    files = render(deployment, target, name, made_by(context))
    for path, text in files.items():
        _write(out / path, text)
    err().print(
        f"{len(files)} files under {out}; apply them with: kubectl apply -k {out}/overlays/{name}", soft_wrap=True
    )


def made_by(context: typer.Context) -> str:
    """The command that makes the same files again, in the directory that it is run in."""
    words = ["herder", "render", "k8s"]
    for parameter in context.command.params:
        name = parameter.name or ""
        source, value = context.get_parameter_source(name), context.params.get(name)
        if source is None or source.name != "COMMANDLINE" or name == "out":
            continue
        if parameter.param_type_name == "argument":
            words.append(str(value))
        elif isinstance(value, bool):
            words.append(parameter.opts[0] if value else parameter.secondary_opts[0])
        else:
            for one in value if isinstance(value, list | tuple) else [value]:
                words += [parameter.opts[0], str(one)]
    return shlex.join(words)


def _image(config: DeploymentConfig) -> str:
    return f"herder:{importlib.metadata.version('herder')}-{'cuda' if config.experts.device == 'cuda' else 'cpu'}"


def _has_vision(config: DeploymentConfig) -> bool:
    """What the checkpoint's config.json says; Llama 4's published checkpoints, if it is not here, see."""
    file = config.model.path / "config.json"
    if not file.is_file():
        return True
    try:
        return "vision_config" in json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise CliError(f"model.path: {file} is not JSON", code=2) from None


def _write(path: Path, text: str) -> None:
    """Leaves a file alone that has this text already."""
    try:
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CliError(f"{path} cannot be written: {error.strerror}") from None
