"""What the verbs that change a running deployment have in common: how the waiting shows, and the closing line."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from cli import endpoint
from cli.report import err
from herder.v1 import control_pb2 as pb
from herder.v1.control_pb2_grpc import ControlServiceStub


@contextmanager
def reshape(server: endpoint.Server, doing: str, done: str) -> Iterator[ControlServiceStub]:
    """The control service, for calls that take as long as weights take to load.

    Shows that it is `doing` meanwhile; at the end says that it is `done`, at which epoch, after how long. Raises
    CliError with the server's sentence when a call fails.
    """
    console = err()
    began = time.monotonic()
    with endpoint.control(server) as stub, console.status(doing):
        yield stub
        seconds = time.monotonic() - began
        limit, metadata = endpoint.LOOK_TIMEOUT_S, server.metadata
        epoch = stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=limit, metadata=metadata).epoch
    console.print(f"{done} (epoch {epoch}, {seconds:.1f} s)", markup=False, soft_wrap=True)
