"""`herder validate`: check a configuration and its checkpoint without starting anything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cli.report import out, verb

if TYPE_CHECKING:  # torch comes with these: not for `herder --help`
    from cli.preflight import Plan
    from llama4.config import TextConfig

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
    routed = 3 * model.hidden_size * model.intermediate_size  # parameters of one routed expert in one layer
    all_routed = routed * model.num_local_experts * len(model.moe_layers)
    rest = other_parameters(model)
    held = [len(plan.experts.experts_of(slot)[model.moe_layers[0]]) for slot in range(config.experts.actors)]
    seats = f"{min(held)}" if min(held) == max(held) else f"{min(held)} to {max(held)}"
    copies = sum(held) / model.num_local_experts
    context = min(config.model.max_context or model.max_position_embeddings, config.engine.kv_tokens)
    rows = {
        "model": f"{config.model.served_name}, {config.model.path}",
        "layers": f"{model.num_hidden_layers}, of which {len(model.moe_layers)} have {model.num_local_experts} experts "
        f"(top {model.num_experts_per_tok})",
        "parameters": f"{count(all_routed + rest)}, of which {count(all_routed)} in routed experts",
        "context": f"{context:,} tokens",
        "attention": f"{config.attention.actors} actors on {config.attention.device}: {count(rest)} parameters and KV "
        f"for {config.engine.kv_tokens:,} tokens each",
        "experts": f"{config.experts.actors} actors on {config.experts.device}: {seats} experts of each layer each, "
        f"at most {count(routed * max(held) * len(model.moe_layers))} parameters"
        + (f"; {copies:g} copies of an expert on average, {config.experts.replicas} at least" if copies > 1 else ""),
        "transport": "p2p over sockets" if config.transport_kind == "p2p" else f"all_to_all by {config.data_backend}",
        "HTTP": f"{config.gateway.host}:{config.gateway.http_port}",
        "gRPC": f"{config.gateway.host}:{config.gateway.grpc_port}, {config.gateway.grpc.mode}"
        + (" with TLS" if config.gateway.grpc.tls else ""),
    }
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in rows.items():
        grid.add_row(name, text)
    return grid


def other_parameters(model: TextConfig) -> int:
    """How many parameters of the text model each attention actor holds: all but the routed experts."""
    hidden, heads, kv_heads = model.hidden_size, model.num_attention_heads, model.num_key_value_heads
    moe, layers = len(model.moe_layers), model.num_hidden_layers
    attention = 2 * hidden * model.head_dim * (heads + kv_heads)
    shared = 3 * hidden * model.intermediate_size + hidden * model.num_local_experts  # the shared expert and the router
    dense = 3 * hidden * model.intermediate_size_mlp
    tables = model.vocab_size * hidden * (1 if model.tie_word_embeddings else 2)
    norms = (2 * layers + 1) * hidden
    return layers * attention + moe * shared + (layers - moe) * dense + tables + norms


def count(parameters: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if parameters >= size:
            return f"{parameters / size:.1f} {unit}"
    return str(parameters)
