"""`herder drain`: end without cutting anything off: the whole deployment, or the expert actor of one slot."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from cli import endpoint
from cli.report import CliError, err, verb
from cli.reshape import reshape
from cli.runfile import find_run
from cli.stop import end
from herder.v1 import control_pb2 as pb

_ASK_EVERY_S = 0.2


@verb
def drain(
    slot: Annotated[
        int | None, typer.Argument(min=0, help="Only this slot: its experts move away and its actor ends.")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="The server's gRPC address, if it is not this user's own: it is drained, but not ended."),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0, help="Seconds for what runs to finish, of the whole deployment; else 60.")
    ] = None,
    http_port: Annotated[int | None, typer.Option(help="Which of this user's deployments, where several run.")] = None,
) -> None:
    """Take no more requests, wait for those that run, and end the deployment; or give up one SLOT of it.

    Without SLOT, it is not ready from the first moment on, and new requests are refused as retryable. What runs beyond
    --timeout is cut off. With --url, whoever started the deployment has to end it: exit code 1 says that it is not
    drained yet.

    With SLOT (as in expert-SLOT), the experts of that actor move to the others while requests run on.

    Examples:

        herder drain

        herder drain --timeout 300 --http-port 8100

        herder drain --url 10.0.0.7:9000

        herder drain 3
    """
    if slot is not None:
        if timeout is not None:
            raise CliError("--timeout is for the whole deployment; a slot is drained when its experts have moved", 2)
        drain_slot(endpoint.grpc_server(url, http_port), slot)
    else:
        drain_all(url, http_port, 60.0 if timeout is None else timeout)


def drain_slot(server: endpoint.Server, slot: int) -> None:
    with reshape(server, f"draining slot {slot}", f"slot {slot} is drained") as stub:
        stub.DrainSlot(pb.DrainSlotRequest(slot=slot), metadata=server.metadata)


def drain_all(url: str | None, http_port: int | None, timeout: float) -> None:
    run = find_run(http_port) if url is None else None
    remaining = finish(endpoint.grpc_server(url, http_port), timeout)
    console = err()
    if remaining:
        message = f"{remaining} requests have not ended within {timeout:g} s"
        if run is None:
            raise CliError(message)
        console.print(f"{message}; they are cut off")
    if run is None:
        console.print(f"{url} is drained")
    else:
        end(run, timeout=60.0, at_once=remaining > 0)


def finish(server: endpoint.Server, timeout: float) -> int:
    """Drains; returns how many requests are left once none is, or the time is over."""
    console = err()
    deadline = time.monotonic() + timeout
    with endpoint.control(server) as stub, console.status("draining") as shown:
        while True:
            answer = stub.Drain(pb.DrainRequest(), timeout=endpoint.LOOK_TIMEOUT_S, metadata=server.metadata)
            if answer.remaining == 0 or time.monotonic() >= deadline:
                return answer.remaining
            shown.update(f"draining: {answer.remaining} requests run")
            time.sleep(_ASK_EVERY_S)
