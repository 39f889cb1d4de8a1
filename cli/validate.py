"""`herder validate`: check a configuration and its checkpoint without starting anything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cli.report import named_lines, out, verb
from cluster.checkpoint_shape import text_shape
from cluster.plan_units import count

if TYPE_CHECKING:  # torch comes with it: not for `herder --help`
    from cli.preflight import Plan
    from cluster.config import DeploymentConfig, VisionConfig
    from engine.image_spec import ImageSpec

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="The deployment's YAML file.", show_default=False)]
ModelDir = Annotated[Path | None, typer.Option("--model", metavar="DIR", help="The checkpoint; wins over model.path.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set one key, as engine.kv_tokens=65536. Repeatable."),
]


@verb
def validate(config: ConfigPath, model: ModelDir = None, settings: Settings = None) -> None:
    """Check a configuration, its checkpoint's headers and the placement; start nothing.

    Exit code 2 and a sentence for each fault if it cannot be served.

    Examples:

        herder validate configs/tiny_cpu.yaml

        herder validate configs/scout_8xh100.yaml --model /models/scout --set experts.per_actor=5
    """
    from cli.preflight import preflight

    plan = preflight(config, model, settings or ())
    out().print(summary(plan))


def summary(plan: Plan) -> Table:
    """What would be served, and how it would be laid out."""
    config, model = plan.config, plan.model
    shape = text_shape(model, config.model.served_name)
    each = shape.expert_parameters * len(model.moe_layers)  # parameters of one expert of every MoE layer
    every = shape.parts["routed experts"]
    held = [len(plan.experts.experts_of(slot)[model.moe_layers[0]]) for slot in range(config.experts.actors)]
    seats = f"{min(held)}" if min(held) == max(held) else f"{min(held)} to {max(held)}"
    copies = sum(held) / model.num_local_experts
    context = min(config.model.max_context or model.max_position_embeddings, config.engine.kv_tokens)
    rows = {
        "model": f"{config.model.served_name}, {config.model.path}",
        "layers": f"{model.num_hidden_layers}, of which {len(model.moe_layers)} have {model.num_local_experts} experts "
        f"(top {model.num_experts_per_tok})",
        "parameters": f"{count(every + shape.beside_experts)}, of which {count(every)} in routed experts",
        "context": f"{context:,} tokens",
        "attention": f"{config.attention.actors} actors on {config.attention.device}: {count(shape.beside_experts)} "
        f"parameters and KV for {config.engine.kv_tokens:,} tokens each",
        "experts": f"{config.experts.actors} actors on {config.experts.device}: {seats} experts of each layer each, "
        f"at most {count(each * max(held))} parameters"
        + (f"; {copies:g} copies of an expert on average, {config.experts.replicas} at least" if copies > 1 else ""),
        "images": "none are taken" if plan.images is None else images(plan.images, config.vision),
        "transport": way(config),
        "HTTP": f"{config.gateway.host}:{config.gateway.http_port}",
        "gRPC": f"{config.gateway.host}:{config.gateway.grpc_port}, {config.gateway.grpc.mode}"
        + (" with TLS" if config.gateway.grpc.tls else ""),
    }
    return named_lines(rows)


def way(config: DeploymentConfig) -> str:
    """How rows travel."""
    if config.transport_kind == "all_to_all":
        return f"all_to_all by {config.data_backend}"
    return "p2p over sockets" if config.attention.device == "cpu" else f"p2p, rows by {config.data_backend}"


def images(spec: ImageSpec, vision: VisionConfig) -> str:
    """How images are encoded, and how many tokens they become."""
    replicas = f"{vision.min_replicas}"
    if vision.max_replicas > vision.min_replicas:
        replicas += f" to {vision.max_replicas}"
    tiles = f"up to {spec.max_tiles} tiles of {spec.tile_size} pixels, {spec.tokens_per_tile} tokens each"
    return f"{replicas} encoders on {vision.device}; {tiles}"
