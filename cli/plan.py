"""`herder plan`: what a model needs and could do on hardware that need not be here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.report import CliError, err, out, verb
from cli.validate import Settings
from cluster.config import load_config
from cluster.machines import MACHINES, find_machine
from cluster.model_shape import PRECISIONS, Precision
from cluster.presets import PRESETS, find_model, model_at

if TYPE_CHECKING:
    from cluster.model_shape import ModelShape
    from cluster.plan_report import DeploymentPlan

DEFAULT_CONTEXT = 32_768
Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL", help=f"A checkpoint directory, or one of {', '.join(PRESETS)}.", show_default=False
    ),
]


@verb
def plan(
    models: Models = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="YAML", help="Plan the actors of a deployment's file.", show_default=False),
    ] = None,
    settings: Settings = None,
    machine: Annotated[
        str | None,
        typer.Option(help=f"One of {', '.join(MACHINES)}. Without it, h100; cpu for a file that asks for no GPUs."),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Devices in all. Without it and --nodes, as few as hold the model.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Whole nodes.")] = None,
    precision: Annotated[
        str | None,
        typer.Option(help=f"Of the weights: {', '.join(PRECISIONS)}. Without it, bf16; fp32 on cpu."),
    ] = None,
    context: Annotated[
        str | None, typer.Option(metavar="TOKENS", help="Of each sequence; k and M may stand for zeros: 10M.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    compare: Annotated[bool, typer.Option("--compare", help="Several models, side by side.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="PNG", help="Draw memory by part and tokens/s over batch.", show_default=False),
    ] = None,
) -> None:
    """Count a model's memory, KV, hardware and greatest speed; needs neither GPUs nor weights.

    Examples:

        herder plan scout

        herder plan maverick --machine h200 --nodes 4 --precision fp8 --context 128k --batch 64

        herder plan --config configs/scout_8xh100.yaml --plot plan.png

        herder plan --compare scout maverick mixtral-8x7b deepseek-v3
    """
    from cli.plan_tables import comparison_table, plan_tables
    from cluster.plan_report import Comparison

    if compare and (config or plot):
        raise CliError(f"--compare does not go with {'--config' if config else '--plot'}", code=2)
    if settings and not config:
        raise CliError("--set needs --config: it changes a key of that file", code=2)
    if len(models or ()) > 1 and not compare:
        raise CliError("several models need --compare", code=2)

    if config:
        given = [name for name, value in (("--gpus", gpus), ("--precision", precision)) if value is not None]
        if given:
            raise CliError(f"{given[0]} does not go with --config: the file says it", code=2)
        plans = [_of_config(config, settings, models[0] if models else None, machine, context, batch, nodes)]
    elif models:
        plans = [_of_model(find_model(name), machine, precision, context, batch, gpus, nodes) for name in models]
    else:
        raise CliError(f"name a MODEL ({', '.join(PRESETS)}, or a directory), or a file by --config", code=2)

    if json:
        answer = Comparison(plans=tuple(plans)) if compare else plans[0]
        typer.echo(answer.model_dump_json(indent=2))
    elif compare:
        out().print(comparison_table(plans))
    else:
        for part in plan_tables(plans[0]):
            out().print(part)
    if plot:
        _draw(plans[0], plot)


def _of_model(
    shape: ModelShape,
    machine: str | None,
    precision: str | None,
    context: str | None,
    batch: int,
    devices: int | None,
    nodes: int | None,
) -> DeploymentPlan:
    from cluster.planner import plan as make_plan

    name = find_machine(machine or "h100")
    return make_plan(
        shape,
        name,
        _precision(precision, name),
        _context(context, shape, min(DEFAULT_CONTEXT, shape.max_context)),
        batch,
        devices,
        nodes,
    )


def _of_config(
    path: Path,
    settings: list[str] | None,
    model: str | None,
    machine: str | None,
    context: str | None,
    batch: int,
    nodes: int | None,
) -> DeploymentPlan:
    from cluster.planner import plan_deployment

    config = load_config(path, settings or ())
    shape = find_model(model) if model else model_at(config.model.path)
    on_cpus = config.attention.device == "cpu"
    name = find_machine(machine or ("cpu" if on_cpus else "h100"))
    if on_cpus != (name == "cpu"):
        raise CliError(f"--machine {name}: {path} asks for {'no GPUs' if on_cpus else 'GPUs'}", code=2)
    longest = min(config.model.max_context or shape.max_context, config.engine.kv_tokens)
    return plan_deployment(config, shape, name, _context(context, shape, longest), batch, nodes)


def _precision(text: str | None, machine: str) -> Precision:
    if text is None:
        return "bf16" if "bf16" in MACHINES[machine].rates else "fp32"
    for known in PRECISIONS:
        if text.lower() == known:
            return known
    raise CliError(f"--precision must be one of {', '.join(PRECISIONS)}, not {text!r}", code=2)


def _context(text: str | None, shape: ModelShape, default: int) -> int:
    if text is None:
        return default
    zeros = {"k": 1_000, "m": 1_000_000}.get(text[-1:].lower(), 1)
    digits = (text[:-1] if zeros > 1 else text).replace(",", "").replace("_", "")
    if not digits.isdecimal() or int(digits) == 0:
        raise CliError(f"--context must be a number of tokens, as 32768 or 10M, not {text!r}", code=2)
    if int(digits) * zeros > shape.max_context:
        raise CliError(f"--context must be at most the {shape.max_context:,} of {shape.name}, not {text}", code=2)
    return int(digits) * zeros


def _draw(plan: DeploymentPlan, path: Path) -> None:
    try:
        from cli.plan_plot import draw
    except ModuleNotFoundError:
        raise CliError("--plot needs matplotlib: pip install 'herder[plot]'", code=2) from None
    try:
        draw(plan, path)
    except (OSError, ValueError) as error:  # the latter for a suffix that names no format
        raise CliError(f"--plot: {path} cannot be written: {error}", code=2) from None
    err().print(f"drawn: {path}")
