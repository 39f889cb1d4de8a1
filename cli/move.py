"""`herder move`: a copy of an expert to another slot, while requests run."""

from __future__ import annotations

from typing import Annotated

import typer

from cli import endpoint
from cli.report import verb
from cli.reshape import reshape
from herder.v1 import control_pb2 as pb


@verb
def move(
    expert: Annotated[int, typer.Argument(min=0, help="The expert's index.")],
    to_slot: Annotated[int, typer.Option("--to", min=0, help="The slot that gets it, and does not hold it yet.")],
    layer: Annotated[int | None, typer.Option(min=0, help="Only in this layer; without it, in all.")] = None,
    from_slot: Annotated[
        int | None,
        typer.Option("--from", min=0, help="The slot that gives it; without it, the holder with the highest load."),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="The server's gRPC address, if it is not this user's own: host:port.")
    ] = None,
    http_port: Annotated[int | None, typer.Option(help="Which of this user's deployments, where several run.")] = None,
) -> None:
    """Move a copy of an expert to another slot of a running deployment.

    Requests run on: the weights load in the background, and are used from one step to the next. `herder status` shows
    which slots hold which experts. Slot N is the actor expert-N.

    Examples:

        herder move 5 --to 2

        herder move 5 --to 2 --layer 3 --from 0
    """
    server = endpoint.grpc_server(url, http_port)
    request = pb.MoveExpertRequest(expert=expert, to_slot=to_slot, layer=layer, from_slot=from_slot)
    where = "" if layer is None else f" of layer {layer}"
    done = f"slot {to_slot} has expert {expert}{where}"
    with reshape(server, f"moving expert {expert}{where} to slot {to_slot}", done) as stub:
        stub.MoveExpert(request, metadata=server.metadata)
