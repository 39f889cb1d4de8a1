"""`herder status`: actors, load and experts of a running deployment."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

import grpc
import typer
from google.protobuf.json_format import MessageToDict
from rich.filesize import decimal
from rich.text import Text

from cli import endpoint
from cli.report import out, table, verb
from herder.v1 import control_pb2 as pb


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
    """Show actors, nodes, ranks, tokens per second, KV use and load per expert of a running deployment.

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
    channel, stub = endpoint.control(server)
    limit, metadata = endpoint.LOOK_TIMEOUT_S, server.metadata
    with channel:
        try:
            return Status(
                stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=limit, metadata=metadata),
                stub.GetLoad(pb.GetLoadRequest(), timeout=limit, metadata=metadata),
                stub.GetExpertPlacement(pb.GetExpertPlacementRequest(), timeout=limit, metadata=metadata),
            )
        except grpc.RpcError as error:
            raise endpoint.grpc_fault(server.where, error) from None


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
    console.print(f"herder {server.version}, epoch {server.epoch}: {state}\n", markup=False)

    actors = table("actor", "role", "rank/slot", "node", "pid", "device", "weights", "memory", "state")
    for actor in server.actors:
        role = pb.ActorRole.Name(actor.role).removeprefix("ACTOR_ROLE_").lower()
        place = [str(actor.index), actor.node_ip, str(actor.pid), actor.device]
        sizes = [decimal(actor.loaded_bytes), decimal(actor.rss_bytes)]
        actors.add_row(*(Text(cell) for cell in [actor.name, role, *place, *sizes, actor.state]))
    console.print(actors, "")

    engines = table(
        "engine",
        "running",
        "waiting",
        "tokens/s",
        "prompt tokens",
        "cached",
        "generated",
        "preempted",
        "KV pages in use",
    )
    for engine in found.load.engines:
        numbers = (
            engine.running,
            engine.waiting,
            round(engine.tokens_per_second),
            engine.prompt_tokens,
            engine.cached_prompt_tokens,
            engine.generated_tokens,
            engine.preemptions,
        )
        kv = ", ".join(
            f"{pages.layer_kind} {percent(pages.used, pages.total)} (cached {percent(pages.cached, pages.total)})"
            for pages in engine.kv_pages
        )
        engines.add_row(Text(engine.actor), *(f"{number:,}" for number in numbers), kv)
    console.print(engines, "")

    experts = table("layer", "tokens", "busiest", "idlest", "share of each expert, in order (expert@slots)")
    experts.columns[-1].justify, experts.columns[-1].no_wrap = "left", False
    for layer in found.placement.layers:
        total = sum(expert.tokens for expert in layer.experts)
        shares = [(expert.tokens, f"{expert.expert}@{'+'.join(map(str, expert.slots))}") for expert in layer.experts]
        busiest, idlest = max(shares), min(shares)
        experts.add_row(
            str(layer.layer),
            f"{total:,}",
            f"{busiest[1]} {percent(busiest[0], total)}",
            f"{idlest[1]} {percent(idlest[0], total)}",
            " ".join(f"{name} {percent(tokens, total)}" for tokens, name in shares),
        )
    console.print(experts)


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f}%" if whole else "-"
