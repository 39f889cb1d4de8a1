"""`herder up --head`: start a Ray cluster of several machines, with its head on this one."""

from __future__ import annotations

import os
import socket
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from cli.ray_node import RAY, NodeIp, RayOptions, Resources, cluster_machines, ray_node, resource_arguments
from cli.report import CliError, err, out, verb
from cli.serve import ending_on_signals

if TYPE_CHECKING:
    from cluster.launch import Machine


@verb
def up(
    ray_options: RayOptions = None,
    head: Annotated[bool, typer.Option("--head", help="This machine is the head: one, and only one, is.")] = False,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where other machines join.")] = 6379,
    node_ip: NodeIp = None,
    resource: Resources = None,
) -> None:
    """Start a Ray cluster with its head on this machine, and keep it until Ctrl-C or SIGTERM.

    Other machines come in by `herder join`; `herder serve CONFIG --address auto` then serves on all of them. The
    cluster ends with its head.

    Machines prove a token to each other, which is made here if there is none (`ray get-auth-token` prints it).
    RAY_AUTH_MODE=disabled, on every machine, does without.

    Examples:

        herder up --head

        herder up --head --node-ip 10.0.0.1 --resource attends=2

        herder up --head -- --num-gpus 8 --dashboard-host 0.0.0.0
    """
    if not head:
        raise CliError(
            "say --head to start a cluster whose head is this machine; `herder join ADDRESS` brings it into another's",
            code=2,
        )
    from cluster.launch import own_address

    host = node_ip or own_address()
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    arguments = ["--head", f"--port={port}", f"--node-ip-address={host}", *resource_arguments(resource)]
    check_free(host, port)
    make_token()
    with suppress(KeyboardInterrupt), ending_on_signals():
        err().print(f"starting Ray's head at {address}", highlight=False)
        with ray_node([*arguments, *(ray_options or ())], drain_s=0) as node:
            tell(address, cluster_machines())
            raise CliError(f"the head has ended: {node.until_lost()}")


def check_free(host: str, port: int) -> None:
    """Raises CliError when the head could not listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise CliError(f"--node-ip, --port: {error.strerror or error}", code=2) from None


def make_token() -> None:
    """The cluster's token, where Ray looks for it, unless there is one."""
    if os.environ.get("RAY_AUTH_MODE", "token") == "token":
        subprocess.run([*RAY, "get-auth-token", "--generate"], check=True, capture_output=True)


def tell(address: str, found: list[Machine]) -> None:
    offers = "; ".join(machine.offers for machine in found)
    out().print(
        f"the head of a Ray cluster runs at {address} ({offers})\n"
        "On every other machine, with this machine's ~/.ray/auth_token copied to the same place:\n"
        f"  herder join {address}\n"
        "Then, here:\n"
        "  herder serve CONFIG --address auto\n"
        "Ctrl-C ends the cluster.",
        markup=False,
        soft_wrap=True,
    )
