"""What `herder serve` leaves for the other verbs: a small JSON file per deployment, in the user's own folder."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from cli.report import CliError


@dataclass(frozen=True, slots=True)
class Run:
    """A deployment that a `herder serve` process of this user runs. `started` tells its pid from a later process's."""

    pid: int
    started: float  # seconds since the Unix epoch, as psutil gives it
    http_port: int
    http_url: str
    grpc_address: str
    config: str
    model: str
    model_dir: str
    serving: bool = False
    api_key: str = ""  # one that its owner may use; the folder is the owner's alone
    grpc_cert: str = ""  # the file of its own certificate, if gRPC is over TLS

    @property
    def path(self) -> Path:
        return folder() / f"{self.http_port}.json"

    def alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return bool(process.create_time() == self.started and process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    def write(self) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = self.path.with_suffix(f".{os.getpid()}.new")
        new.touch(mode=0o600)
        new.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        new.replace(self.path)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def ready(self, http_url: str, grpc_address: str) -> Run:
        return replace(self, http_url=http_url, grpc_address=grpc_address, serving=True)


def folder() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "herder" if runtime else Path.home() / ".cache" / "herder"


def live_runs() -> list[Run]:
    """This user's running deployments by port; the files of dead ones are removed."""
    runs = []
    for path in sorted(folder().glob("*.json")):
        try:
            run = Run(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # going away, or another version's
            continue
        if run.alive():
            runs.append(run)
        else:
            path.unlink(missing_ok=True)
    return runs


def find_run(http_port: int | None = None) -> Run:
    """The running deployment, or the one on `http_port` where there are several. Raises CliError."""
    runs = [run for run in live_runs() if http_port in (None, run.http_port)]
    if not runs:
        where = f" on HTTP port {http_port}" if http_port else ""
        raise CliError(f"no deployment of yours runs here{where}; start one with: herder serve CONFIG")
    if len(runs) > 1:
        ports = ", ".join(str(run.http_port) for run in runs)
        raise CliError(f"several deployments run here (HTTP ports {ports}); say which with --http-port", code=2)
    return runs[0]
