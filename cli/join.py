"""`herder join`: bring this machine into a Ray cluster, and keep it there."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated

import typer

from cli.ray_node import NodeIp, RayOptions, Resources, cluster_machines, ray_node, resource_arguments
from cli.report import CliError, err, out, verb
from cli.serve import ending_on_signals

_CONNECT_TIMEOUT_S = 5.0
_PAUSE_S = 1.0  # before it joins again; doubled while that fails
_LONGEST_PAUSE_S = 15.0
_DRAIN_S = 30.0


@verb
def join(
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="The head's, as `herder up --head` prints it.")],
    ray_options: RayOptions = None,
    node_ip: NodeIp = None,
    resource: Resources = None,
) -> None:
    """Bring this machine into the Ray cluster whose head is at ADDRESS, and keep it there until Ctrl-C or SIGTERM.

    A machine whose network was cut is taken for dead after a while, and its Ray ends. It then joins again, and so it
    does under a new head at the same address: as often and as long as it takes.

    The cluster's token (`ray get-auth-token` on the head) has to be in ~/.ray/auth_token or RAY_AUTH_TOKEN; Ray's and
    Python's versions have to be the head's.

    Examples:

        herder join 10.0.0.1:6379

        herder join 10.0.0.1:6379 --resource expert_host=2 --node-ip 10.0.0.2

        herder join 10.0.0.1:6379 -- --num-gpus 8
    """
    host, port = parse(address)
    arguments = [f"--address={address}", *resource_arguments(resource)]
    if node_ip:
        arguments.append(f"--node-ip-address={node_ip}")
    check_answers(host, port)
    with suppress(KeyboardInterrupt), ending_on_signals():
        err().print(f"joining the cluster at {address}")
        stay(address, [*arguments, *(ray_options or ())])


def stay(address: str, arguments: Sequence[str]) -> None:
    """Joins, again and again. Raises CliError if it has never been in."""
    been_in, pause_s = False, _PAUSE_S
    while True:
        try:
            with ray_node(arguments, _DRAIN_S) as node:
                tell(address)
                been_in, pause_s = True, _PAUSE_S
                reason = node.until_lost()
        except CliError as error:
            if not been_in:
                raise
            reason = str(error)
        err().print(f"this machine is not in the cluster ({reason}); joining again in {pause_s:g} s")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def tell(address: str) -> None:
    found = cluster_machines()
    (here,) = [machine for machine in found if machine.here]
    out().print(
        f"{here.address} is in the cluster at {address} with {here.offers}; "
        f"{len(found)} machines are. Ctrl-C takes it out.",
        markup=False,
        soft_wrap=True,
    )


def parse(address: str) -> tuple[str, int]:
    """Host and port. Raises CliError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise CliError(f"ADDRESS {address}: must have the form HOST:PORT, such as 10.0.0.1:6379", code=2)
    return host.strip("[]"), int(port)


def check_answers(host: str, port: int) -> None:
    """Raises CliError when nobody listens there: Ray would try for minutes."""
    try:
        socket.create_connection((host, port), _CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise CliError(
            f"ADDRESS: nothing answers at {host}:{port} ({error.strerror or error}); is it the head's, and "
            "can this machine connect to it?"
        ) from None
