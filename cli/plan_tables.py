"""A plan as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cli.report import named_lines, table
from cluster.model_shape import Precision
from cluster.plan_report import DeploymentPlan, LayoutReport, NodeReport, RoleReport
from cluster.plan_units import count, flops, size


def plan_tables(plan: DeploymentPlan) -> Iterator[RenderableType]:
    """All of a plan, part by part."""
    work = f"{_several(plan.batch, 'sequence')} of {plan.context:,} tokens"
    yield Text(f"{plan.model} on {plan.machine.title} in {plan.precision.upper()}: {work}", style="bold")
    parts: list[RenderableType] = [_parameters(plan), _facts(plan), _kv(plan), _hardware(plan)]
    if plan.layout:
        parts += [_nodes(plan.layout), _decode(plan)]
    for part in [*parts, _notes(plan)]:
        yield Padding(part, (1, 0, 0, 0))


def comparison_table(plans: Sequence[DeploymentPlan]) -> Group:
    """Plans side by side, a column each."""
    first = plans[0]
    grid = table("", *(plan.model for plan in plans))
    grid.columns[0].no_wrap = False
    columns = [_compared(plan) for plan in plans]
    for name in columns[0]:
        grid.add_row(name, *(column[name] for column in columns))
    return Group(Text(f"on {first.machine.title}, in {first.precision.upper()}", style="italic"), grid)


def _compared(plan: DeploymentPlan) -> dict[str, str]:
    moe, least, transfer, speed = plan.experts, plan.least, plan.transfer, plan.speed
    planned_kv = next(kv.hybrid for kv in plan.kv.contexts if kv.context == plan.context)
    return {
        "parameters": count(plan.parameters.total),
        "active": count(plan.parameters.active),
        "active share": f"{plan.parameters.active_share:.1%}",
        "MoE layers": f"{moe.moe_layers}" if moe else "-",
        "experts, chosen": f"{moe.experts}, {moe.top_k}" if moe else "-",
        "combinations, a layer": combinations(moe.combinations) if moe else "-",
        "FLOPs of an expert, a layer": flops(moe.flops_per_token_and_layer).removesuffix("FLOPs") if moe else "-",
        "FLOPs of a token": flops(speed.flops_per_token).removesuffix("FLOPs"),
        **{f"weights in {one.upper()}": size(number) for one, number in plan.parameters.total_bytes.items()},
        "context": f"{plan.context:,}",
        "KV of it": size(planned_kv),
        "KV of a token, all layers": size(plan.kv.bytes_per_token),
        "devices by memory": f"{least.by_memory}",
        "attention + expert devices": "-" if least.devices is None else f"{least.attention} + {least.experts}",
        "all-to-all, token and layer": size(transfer.bytes_per_token_and_layer) if transfer else "-",
        "tokens/s, batch 1, one device": f"{speed.single_stream_tokens_per_s:,.0f}",
        "compute-bound experts: batch": f"{speed.compute_bound_batch:,}" if speed.compute_bound_batch else "-",
    }


def combinations(number: int) -> str:
    return f"{number:,}" if number < 10**6 else f"{number:.2e}"


def _parameters(plan: DeploymentPlan) -> Table:
    columns: list[Precision] = list(plan.parameters.total_bytes)
    grid = table("weights", "parameters", *(one.upper() for one in columns))
    for part in sorted(plan.parameters.parts, key=lambda part: -part.parameters):
        grid.add_row(part.name, count(part.parameters), *(size(part.bytes[one]) for one in columns))
    total = plan.parameters.total_bytes
    grid.add_row("all", count(plan.parameters.total), *(size(total[one]) for one in columns), style="bold")
    return grid


def _facts(plan: DeploymentPlan) -> Table:
    rows = {
        "active": f"{count(plan.parameters.active)} parameters for a token, {plan.parameters.active_share:.1%} of all; "
        f"{flops(plan.speed.flops_per_token)} at the end of the context",
    }
    if moe := plan.experts:
        rows["experts"] = (
            f"{moe.top_k} of {moe.experts} in each of {moe.moe_layers} layers: {combinations(moe.combinations)} "
            f"combinations a layer; {count(moe.parameters_each)} parameters and "
            f"{flops(moe.flops_per_token_and_layer)} per token, each"
        )
    if plan.transfer:
        rows["all-to-all"] = (
            f"{size(plan.transfer.bytes_per_token_and_layer)} per token and MoE layer, there and back; "
            f"{size(plan.transfer.bytes_per_token)} per token"
        )
    return named_lines(rows)


def _kv(plan: DeploymentPlan) -> Group:
    kv = plan.kv
    layers = kv.full_layers + kv.chunked_layers
    each = size(kv.bytes_per_token_and_layer)
    title = f"KV: {each} a token and layer; {kv.full_layers} of {layers} layers keep all tokens"
    if kv.chunked_layers:
        title += f", the others one chunk of {kv.chunk:,}"
        grid = table("one sequence", "hybrid", "naive", "a full layer", "a chunked layer")
    else:
        grid = table("one sequence", "all layers", "a layer")
    for one in kv.contexts:
        sizes = [one.hybrid, one.full_layer]
        if one.chunked_layer is not None:
            sizes = [one.hybrid, one.naive, one.full_layer, one.chunked_layer]
        grid.add_row(f"{one.context:,}", *map(size, sizes))
    return Group(Text(title, style="italic"), grid)


def _hardware(plan: DeploymentPlan) -> Table:
    least, layout = plan.least, plan.layout
    by_memory = f"{_several(least.by_memory, 'device')} if all could be cut at will"
    rows = {"least hardware": by_memory}
    if least.devices is not None and least.nodes is not None:
        devices, nodes = _several(least.devices, "device"), _several(least.nodes, "node")
        rows["least hardware"] = (
            f"{devices} on {nodes}, {least.attention} for attention and {least.experts} for experts; {by_memory}"
        )
    if layout:
        rows["attention"] = f"{_several(layout.attention.actors, 'actor')}: {_role(layout.attention)}"
        if layout.experts:
            held = layout.experts_per_actor
            each = f"{max(held)}" if min(held) == max(held) else f"{min(held)} to {max(held)}"
            rows["experts"] = (
                f"{_several(layout.experts.actors, 'actor')} with {each} of each layer: {_role(layout.experts)}"
            )
        if layout.vision:
            vision = layout.vision
            replicas = _several(vision.max_replicas, "replica")
            if vision.min_replicas < vision.max_replicas:
                replicas = f"{vision.min_replicas} to {replicas}"
            rows["vision"] = f"{replicas} on {vision.device}: {size(vision.weights)} of weights each"
        rows["room for"] = f"{_several(layout.sequences, 'sequence')} of {plan.context:,} tokens"
    if plan.misfit:
        rows["does not fit"] = plan.misfit
    return named_lines(rows)


def _role(role: RoleReport) -> str:
    kv = f" and {size(role.kv)} of KV" if role.kv else ""
    return f"{size(role.weights)} of weights{kv} each, of {size(role.room)}"


def _nodes(layout: LayoutReport) -> Table:
    """Neighbours that hold equal numbers of actors share a line."""
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("node", "attention actors", "expert actors (experts of each layer)"):
        grid.add_column(column)
    for number, node in enumerate(layout.nodes):
        slots = ", ".join(f"{slot} ({layout.experts_per_actor[slot]})" for slot in node.experts)
        grid.add_row(str(number), _ranks(node), slots or "-")
    return grid


def _ranks(node: NodeReport) -> str:
    return ", ".join(map(str, node.attention)) or "-"


def _decode(plan: DeploymentPlan) -> Group:
    grid = table("batch", "tokens/s", "each", "attention", "experts", "transfer", "most of it", "fits")
    for step in plan.speed.decode:
        times = (step.attention_s, step.experts_s, step.transfer_s)
        grid.add_row(
            f"{step.batch:,}",
            f"{step.tokens_per_s:,.0f}",
            f"{step.tokens_per_s / step.batch:,.1f}",
            *(f"{1000 * time:,.2f} ms" for time in times),
            step.limit,
            "yes" if step.fits else "no",
        )
    return Group(Text("Decoding at most, the parts of a step, and whether the KV fits", style="italic"), grid)


def _notes(plan: DeploymentPlan) -> Table:
    machine, speed = plan.machine, plan.speed
    bound = f"an expert is bound by compute from {speed.compute_bound_rows:,.0f} rows on"
    if speed.compute_bound_batch:
        bound += f", which a batch of {speed.compute_bound_batch:,} brings"
    return named_lines(
        {
            "roofline": f"{size(machine.bandwidth)}/s, {machine.flops_per_s / 1e12:g} TFLOP/s a device: " + bound,
            "assumed": "\n".join(plan.assumptions),
            "sources": "\n".join(machine.sources),
        }
    )


def _several(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
