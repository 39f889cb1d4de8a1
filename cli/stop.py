"""`herder stop`: end a deployment of this user."""

from __future__ import annotations

import signal
import time
from typing import Annotated

import psutil
import typer

from cli.report import CliError, err, verb
from cli.runfile import Run, find_run

_LOOK_EVERY_S = 0.1


@verb
def stop(
    http_port: Annotated[int | None, typer.Option(help="Which deployment, where several run.")] = None,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait for its end.")] = 60.0,
) -> None:
    """End the deployment that `herder serve` of this user runs here, and wait until it is gone.

    Requests that run have gateway.drain_timeout_s to finish.

    Examples:

        herder stop

        herder stop --http-port 8100
    """
    end(find_run(http_port), timeout)


def end(run: Run, timeout: float, at_once: bool = False) -> None:
    """Asks the deployment to end, and waits until it is gone. Raises CliError when it is not, in time.

    `at_once` asks again: at the second time, the deployment does not wait for requests that run.
    """
    _ask(run)
    console = err()
    deadline = time.monotonic() + timeout
    with console.status(f"stopping {run.model} (pid {run.pid})"):
        while run.alive():
            if time.monotonic() >= deadline:
                raise CliError(f"{run.model} (pid {run.pid}) has not ended within {timeout:g} s; it goes on stopping")
            time.sleep(_LOOK_EVERY_S)
            if at_once:
                _ask(run)
    run.remove()
    console.print(f"stopped {run.model} (pid {run.pid})")


def _ask(run: Run) -> None:
    try:
        psutil.Process(run.pid).send_signal(signal.SIGTERM)
    except psutil.NoSuchProcess:
        pass
    except psutil.AccessDenied:
        raise CliError(f"process {run.pid} is not yours to stop") from None
