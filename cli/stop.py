"""`herder stop`: end a deployment of this user."""

from __future__ import annotations

import signal
import time
from typing import Annotated

import psutil
import typer

from cli.report import CliError, err, verb
from cli.runfile import find_run


@verb
def stop(
    http_port: Annotated[int | None, typer.Option(help="Which deployment, where several run.")] = None,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait for its end.")] = 60.0,
) -> None:
    """End the deployment that `herder serve` of this user runs here, and wait until it is gone.

    Examples:

        herder stop

        herder stop --http-port 8100
    """
    run = find_run(http_port)
    try:
        psutil.Process(run.pid).send_signal(signal.SIGTERM)
    except psutil.NoSuchProcess:
        pass
    except psutil.AccessDenied:
        raise CliError(f"process {run.pid} is not yours to stop") from None
    console = err()
    deadline = time.monotonic() + timeout
    with console.status(f"stopping {run.model} (pid {run.pid})"):
        while run.alive():
            if time.monotonic() >= deadline:
                raise CliError(f"{run.model} (pid {run.pid}) has not ended within {timeout:g} s; it goes on stopping")
            time.sleep(0.1)
    run.remove()
    console.print(f"stopped {run.model} (pid {run.pid})")
