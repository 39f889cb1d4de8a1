"""Reading from a socket that may block, by a deadline."""

import socket
import time
from collections.abc import Callable


def time_left(deadline: float, clock: Callable[[], float] = time.monotonic) -> float:
    """Seconds until the deadline, above 0. Raises TimeoutError."""
    left = deadline - clock()
    if left <= 0:
        raise TimeoutError("the other end took too long")
    return left


def receive_exactly(
    peer: socket.socket, length: int, deadline: float, clock: Callable[[], float] = time.monotonic
) -> bytes:
    """So many bytes; sets the socket's timeout. Raises OSError: TimeoutError, or the other end has closed it before."""
    data = b""
    while len(data) < length:
        peer.settimeout(time_left(deadline, clock))
        more = peer.recv(length - len(data))
        if not more:
            raise ConnectionResetError("the other end closed the connection before it had said all")
        data += more
    return data
