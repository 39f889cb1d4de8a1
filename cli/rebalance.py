"""`herder rebalance`: even out the expert actors' load, now."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from cli import endpoint
from cli.report import err, verb
from herder.v1 import control_pb2 as pb


@verb
def rebalance(
    url: Annotated[
        str | None, typer.Option(help="The server's gRPC address, if it is not this user's own: host:port.")
    ] = None,
    http_port: Annotated[int | None, typer.Option(help="Which of this user's deployments, where several run.")] = None,
) -> None:
    """Replicate and move experts of a running deployment so that its slots are loaded evenly.

    Loads are token counts over a moving average (balance.window_s). Requests run on. With balance.mode=auto the
    deployment does this by itself.

    Examples:

        herder rebalance

        herder rebalance --url 10.0.0.7:9000
    """
    server = endpoint.grpc_server(url, http_port)
    console = err()
    began = time.monotonic()
    with endpoint.control(server) as stub, console.status("rebalancing"):
        moved = stub.Rebalance(pb.RebalanceRequest(), metadata=server.metadata).moved
        seconds = time.monotonic() - began
        request, limit = pb.GetExpertPlacementRequest(), endpoint.LOOK_TIMEOUT_S
        placement = stub.GetExpertPlacement(request, timeout=limit, metadata=server.metadata)
    load = f"the busiest slot has {placement.balancedness:.2f} x the mean load"
    if moved:
        before = f"{placement.balancedness_before:.2f} before; epoch {placement.epoch}, {seconds:.1f} s"
        console.print(f"experts have moved: {load} ({before})", markup=False, soft_wrap=True)
    else:
        console.print(f"nothing to move: {load}", markup=False, soft_wrap=True)
