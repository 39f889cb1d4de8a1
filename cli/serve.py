"""`herder serve`: start a deployment and keep it until Ctrl-C."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import psutil
import typer

from cli.progress import LoadProgress
from cli.report import CliError, err, out, verb
from cli.runfile import Run, live_runs
from cli.validate import ConfigPath, ModelDir, Settings, summary
from cluster.config import ConfigError, DeploymentConfig

if TYPE_CHECKING:
    from actors.deployment import Deployment

Handler = Callable[[int, FrameType | None], None] | signal.Handlers
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@verb
def serve(
    config: ConfigPath,
    model: ModelDir = None,
    settings: Settings = None,
    http_port: Annotated[int | None, typer.Option(help="Wins over gateway.http_port.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Wins over gateway.grpc_port.")] = None,
    address: Annotated[
        str | None, typer.Option(help="A running Ray cluster, as auto or ray-head:6379; without it, Ray starts here.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all that is checked before a start, and print what would start.")
    ] = False,
) -> None:
    """Start a deployment and keep it until Ctrl-C, SIGTERM or `herder stop`.

    It then takes no more requests and gives those that run gateway.drain_timeout_s to finish; a second Ctrl-C cuts that
    short.

    Examples:

        herder serve configs/tiny_cpu.yaml

        herder serve configs/tiny_cpu.yaml --set experts.actors=4 --http-port 8100 --grpc-port 9100

        herder serve configs/scout_8xh100.yaml --model /models/scout --address auto
    """
    from actors.api_keys import read_keys
    from cli.preflight import check_ports, preflight

    plan = preflight(config, model, settings or (), http_port, grpc_port)
    deployment = plan.config
    if address is None:  # with an address, the ports are the cluster's own
        check_ports(deployment.gateway)
    if dry_run:
        out().print(summary(plan))
        return
    for other in live_runs():
        if other.http_port == deployment.gateway.http_port:
            raise CliError(
                f"gateway.http_port: port {other.http_port} is used by the deployment with pid {other.pid}", code=2
            )
    run = Run(
        pid=os.getpid(),
        started=psutil.Process().create_time(),
        http_port=deployment.gateway.http_port,
        http_url="",
        grpc_address="",
        config=str(config),
        model=deployment.model.served_name,
        model_dir=str(deployment.model.path),
        api_key=next(iter(read_keys(deployment.gateway)), ""),
        grpc_cert=str(tls.cert) if (tls := deployment.gateway.grpc.tls) else "",
    )
    run.write()
    try:
        keep(deployment, run, address)
    finally:
        run.remove()


def keep(config: DeploymentConfig, run: Run, address: str | None) -> None:
    """Launches `config`, waits for a signal, and stops it. Raises CliError if it fails."""
    from actors.deployment import launch

    console = err()
    running: Deployment | None = None
    failed = False
    with ending_on_signals():
        try:
            with LoadProgress(console) as progress:
                running = launch(config, address=address, on_progress=progress)
            ending_signals(_interrupt)  # ray.init has replaced one of them
            run = run.ready(reachable(running.http_url), reachable(running.grpc_address))
            run.write()
            tell(run)
            running.wait()
        except (KeyboardInterrupt, SystemExit):  # the latter is how Ray takes a SIGTERM while it starts
            if running is not None:
                drain(running, config.gateway.drain_timeout_s)
            console.print("stopping")
        except (CliError, ConfigError):
            raise
        except Exception as error:  # Ray's own, torch's, the operating system's: each is one sentence to the user
            failed = True
            raise CliError(f"{'the deployment failed' if running else 'it did not start'}: {cause(error)}") from error
        finally:
            ending_signals(signal.SIG_IGN)
            if running is not None and (session := running.stop(keep_logs=failed)) is not None:
                console.print(f"Ray's logs of it: {session / 'logs'}", soft_wrap=True)


def drain(running: Deployment, timeout_s: float) -> None:
    """Lets what runs finish, unless another signal comes."""
    ending_signals(_interrupt)
    try:
        err().print(f"draining for up to {timeout_s:g} s; Ctrl-C again to stop at once")
        if remaining := running.drain(timeout_s):
            err().print(f"{remaining} requests have not ended; they are cut off")
    except KeyboardInterrupt:
        pass
    except Exception as error:  # the controller is gone: there is nothing to wait for
        err().print(f"draining failed: {cause(error)}")


def tell(run: Run) -> None:
    message = '{"role": "user", "content": "17+25="}'
    out().print(
        f"{run.model} is served\n"
        f"  HTTP  {run.http_url}/v1   gRPC  {run.grpc_address}\n"
        "Ask it, from another terminal:\n"
        f'  {program()} chat "17+25="\n'
        f"  curl {run.http_url}/v1/chat/completions -H 'content-type: application/json' \\\n"
        f"""    -d '{{"model": "{run.model}", "messages": [{message}], "temperature": 0}}'\n"""
        "Ctrl-C or `herder stop` ends it.",
        markup=False,
        soft_wrap=True,
    )


def program() -> str:
    """What to type for this program: its name where the shell finds it, else the path by which it was called."""
    found = shutil.which("herder")
    return "herder" if found and Path(found).resolve() == Path(sys.argv[0]).resolve() else sys.argv[0]


def cause(error: BaseException) -> str:
    """The first line of what lies behind `error`: Ray wraps an actor's exception in its own, traceback and all."""
    while isinstance(inner := getattr(error, "cause", None), BaseException):
        error = inner
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def reachable(address: str) -> str:
    """`address`, where it stands for all interfaces of this machine, as one that can be asked from here."""
    return re.sub(r"(^|//)0\.0\.0\.0:", r"\g<1>127.0.0.1:", address)


def ending_signals(handler: Handler) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    ending_signals(signal.SIG_IGN)  # a second Ctrl-C must not leave half a deployment behind
    raise KeyboardInterrupt


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Meanwhile the signals that ask for an end raise KeyboardInterrupt."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    ending_signals(_interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
