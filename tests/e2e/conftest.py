"""Deployments for the tests: real Ray, real actors, real endpoints, one at a time."""

from __future__ import annotations

import re
import secrets
import socket
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import ray

from actors.deployment import Deployment, launch
from cluster.config import load_config

ROOT = Path(__file__).parents[2]
TINY = ROOT / "checkpoints" / "tiny"
CONFIG = ROOT / "configs" / "tiny_cpu.yaml"


def free_port() -> int:
    """One that nobody has: below those that a connection may be given before it is used, above Ray's workers'."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


_kept: list[Deployment] = []  # the plain deployment, for the modules that want it one after the other


def start(*settings: str, address: str | None = None) -> Deployment:
    """The tiny deployment under these settings, without an image encoder until one is asked for."""
    end_kept()
    common = (f"gateway.http_port={free_port()}", f"gateway.grpc_port={free_port()}", "vision.min_replicas=0")
    return launch(load_config(CONFIG, [*common, *settings]), address=address)


def end_kept() -> None:
    while _kept:
        _kept.pop().stop()


@contextmanager
def running(*settings: str, address: str | None = None) -> Iterator[Deployment]:
    """The tiny deployment under these settings, stopped at the end."""
    deployment = start(*settings, address=address)
    try:
        yield deployment
    finally:
        deployment.stop()


@pytest.fixture(scope="module")
def tiny() -> Deployment:
    """Two attention and two expert actors over the bundled checkpoint, until a test wants another deployment."""
    if not _kept:
        _kept.append(start())
    return _kept[0]


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    end_kept()


def ray_session() -> Path:
    """The folder of this process' Ray, with its logs."""
    return Path(ray._private.worker.global_worker.node.get_session_dir_path())


def logged() -> list[str]:
    """The lines that the workers of this process' Ray have logged, in the order of none but each worker's own."""
    logs = [log.read_text(errors="replace") for log in ray_session().glob("logs/worker-*.err")]
    return [line for log in logs for line in log.splitlines()]


# By Herder's logger, but for each request's end, of which there are too many; or at a process' violent end.
_TOLD = re.compile(
    r" (INFO|WARNING|ERROR) herder (?!request )"
    r'|"level": "(INFO|WARNING|ERROR)", "logger": "herder", "event": "(?!request[ "])'
    r"|\*\*\* SIG|Fatal Python error"
)
_LINES = 60


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test's report says what the deployment's actors told last: their logs go with it."""
    report = yield
    if report.failed and ray.is_initialized():
        lines = sorted(line for line in logged() if _TOLD.search(line))
        report.sections.append(("the deployment's logs", "\n".join(lines[-_LINES:])))
    return report
