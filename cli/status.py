"""`herder status`: actors, load and experts of a running deployment, readable at 80 columns."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from cli import endpoint
from cli.report import out, table, verb
from herder.v1 import control_pb2 as pb

_BUSIEST = 8  # experts of a layer that are shown


@dataclass(frozen=True, slots=True)
class Status:
    server: pb.GetServerInfoResponse
    load: pb.GetLoadResponse
    placement: pb.GetExpertPlacementResponse


@verb
def status(
    url: Annotated[
        str | None, typer.Option(help="The server's gRPC address, if it is not this user's own: host:port.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    http_port: Annotated[int | None, typer.Option(help="Which of this user's deployments, where several run.")] = None,
) -> None:
    """Show actors, nodes, tokens per second, KV use, balance and load per expert of a running deployment.

    The number in an actor's name is its rank (attention) or slot (experts). --json has it all, every expert's load
    too.

    Examples:

        herder status

        herder status --url 10.0.0.7:9000 --json
    """
    found = ask(endpoint.grpc_server(url, http_port))
    if as_json:
        print(json.dumps(as_dict(found), indent=2))
    else:
        show(found)


def ask(server: endpoint.Server) -> Status:
    limit, metadata = endpoint.LOOK_TIMEOUT_S, server.metadata
    with endpoint.control(server) as stub:
        return Status(
            stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=limit, metadata=metadata),
            stub.GetLoad(pb.GetLoadRequest(), timeout=limit, metadata=metadata),
            stub.GetExpertPlacement(pb.GetExpertPlacementRequest(), timeout=limit, metadata=metadata),
        )


def as_dict(found: Status) -> dict[str, Any]:
    """The three answers under one roof: 64-bit numbers come as text, as in all protobuf JSON."""
    parts = {"server": found.server, "load": found.load, "placement": found.placement}
    return {
        name: MessageToDict(part, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        for name, part in parts.items()
    }


def show(found: Status) -> None:
    console = out()
    server = found.server
    state = "ready" if server.ready else f"not ready: {server.reason}"
    console.print(f"herder {server.version}, epoch {server.epoch}: {state}", markup=False)
    console.print(
        f"{server.failovers:,} failovers, {sum(engine.parked for engine in found.load.engines):,} requests parked",
        balance(found.placement),
        "",
        sep="\n",
        markup=False,
    )
    for shown in (
        actor_table(server.actors),
        load_table(found.load.engines),
        total_table(found.load.engines),
        slot_table(found.placement.layers),
        expert_table(found.placement.layers),
    ):
        console.print(shown, "")


def balance(placement: pb.GetExpertPlacementResponse) -> str:
    """How even the slots' loads are, in a sentence."""
    mode = pb.BalanceMode.Name(placement.balance_mode).removeprefix("BALANCE_MODE_").lower()
    load = f"busiest slot {placement.balancedness:.2f} x the mean" if placement.balancedness else "no load yet"
    moved = ""
    if placement.HasField("seconds_since_move"):
        moved = f"; {placement.balancedness_before:.2f} before the move {placement.seconds_since_move:.0f} s ago"
    return f"balance {mode}: {load}{moved}"


def actor_table(actors: Iterable[pb.ActorInfo]) -> Table:
    rows = table("actor", "node", "pid", "device", "weights", "memory", "state")
    for actor in actors:
        sizes = [decimal(actor.loaded_bytes), decimal(actor.rss_bytes)]
        cells = [actor.name, actor.node_ip, str(actor.pid), actor.device, *sizes, actor.state]
        rows.add_row(*(Text(cell) for cell in cells))
    return rows


def load_table(engines: Sequence[pb.EngineLoad]) -> Table:
    """What is under way."""
    kinds = sorted({pages.layer_kind for engine in engines for pages in engine.kv_pages})
    rows = table("engine", "running", "parked", "waiting", "tokens/s", *(f"KV {kind}" for kind in kinds))
    for engine in engines:
        numbers = (engine.running, engine.parked, engine.waiting, round(engine.tokens_per_second))
        kv = {pages.layer_kind: pages for pages in engine.kv_pages}
        shares = [
            f"{percent(kv[kind].used, kv[kind].total)} + {percent(kv[kind].cached, kv[kind].total)}" for kind in kinds
        ]
        rows.add_row(Text(engine.actor), *(f"{number:,}" for number in numbers), *shares)
    rows.caption, rows.caption_justify = "KV pages: held by requests + kept by the prefix cache", "left"
    return rows


def total_table(engines: Iterable[pb.EngineLoad]) -> Table:
    """Since the start."""
    rows = table("engine", "steps", "prompt tokens", "cached", "generated", "preempted")
    for engine in engines:
        numbers = (
            engine.steps,
            engine.prompt_tokens,
            engine.cached_prompt_tokens,
            engine.generated_tokens,
            engine.preemptions,
        )
        rows.add_row(Text(engine.actor), *(f"{number:,}" for number in numbers))
    return rows


def slot_table(layers: Iterable[pb.LayerExperts]) -> Table:
    """Since the start, an expert's tokens shared out evenly over its holders of now."""
    copies: Counter[int] = Counter()
    tokens: Counter[int] = Counter()
    for layer in layers:
        for expert in layer.experts:
            for slot in expert.slots:
                copies[slot] += 1
                tokens[slot] += expert.tokens // len(expert.slots)
    rows = table("slot", "experts, over all layers", "tokens", "share")
    for slot in sorted(copies):
        rows.add_row(str(slot), f"{copies[slot]:,}", f"{tokens[slot]:,}", percent(tokens[slot], tokens.total()))
    return rows


def expert_table(layers: Iterable[pb.LayerExperts]) -> Table:
    """Since the start. The busiest experts of each layer, and its idlest one."""
    rows = table("layer", "tokens", "the busiest experts, and the idlest (expert@slots)")
    rows.columns[-1].justify, rows.columns[-1].no_wrap = "left", False
    for layer in layers:
        total = sum(expert.tokens for expert in layer.experts)
        ranked = sorted(layer.experts, key=lambda expert: expert.tokens, reverse=True)
        shares = [
            f"{expert.expert}@{'+'.join(map(str, expert.slots))}\u00a0{percent(expert.tokens, total)}"
            for expert in ranked
        ]
        if len(shares) > _BUSIEST + 1:
            shares[_BUSIEST:-1] = ["..."]
        rows.add_row(str(layer.layer), f"{total:,}", "  ".join(shares))
    return rows


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f}%" if whole else "-"
