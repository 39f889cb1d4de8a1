"""`herder scale`: more or fewer actors, while requests run."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from cli import endpoint
from cli.report import verb
from cli.reshape import reshape
from herder.v1 import control_pb2 as pb


class Role(StrEnum):
    EXPERTS = "experts"
    ATTENTION = "attention"


@verb
def scale(
    role: Annotated[Role, typer.Argument(help="Which actors.")],
    actors: Annotated[int, typer.Argument(min=1, help="How many of them there shall be.")],
    url: Annotated[
        str | None, typer.Option(help="The server's gRPC address, if it is not this user's own: host:port.")
    ] = None,
    http_port: Annotated[int | None, typer.Option(help="Which of this user's deployments, where several run.")] = None,
) -> None:
    """Start or end expert or attention actors of a running deployment, until there are ACTORS of them.

    Requests run on: new actors load their weights in the background, and join between two steps. If that fails, all is
    as it was. Ctrl-C ends the waiting, not the scaling.

    Examples:

        herder scale experts 4

        herder scale attention 1 --url 10.0.0.7:9000
    """
    server = endpoint.grpc_server(url, http_port)
    kind = "expert" if role is Role.EXPERTS else "attention"
    amount = f"{actors} {kind} {'actor' if actors == 1 else 'actors'}"
    with reshape(server, f"scaling to {amount}", f"{amount} serve{'s' if actors == 1 else ''}") as stub:
        if role is Role.EXPERTS:
            stub.ScaleExperts(pb.ScaleExpertsRequest(actors=actors), metadata=server.metadata)
        else:
            stub.ScaleAttention(pb.ScaleAttentionRequest(actors=actors), metadata=server.metadata)
