"""A torch store of two processes, over a connection that they use for nothing else meanwhile.

So a group of two is formed by those two alone: there is no third process that must be reached and must live, nothing
more listens, and whoever is at the other end has proved itself when the connection was made. What one sets is sent to
the other, which reads when it waits for a key.

    message  length of the key as a uint16, of the value as a uint32, key, value; an empty key: nothing more is set
"""

import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from struct import Struct

from torch._C._distributed_c10d import Store

from dispatch.receiving import receive_exactly, time_left

_LENGTHS = Struct("<HI")
_MAX_KEY, _MAX_VALUE = 1 << 10, 1 << 20


class PairStore(Store):
    """One end. For one thread; everything raises OSError if the other end goes, lies or takes too long.

    torch finds these methods only as long as this very object lives.

    Args:
        peer: connected, blocking or not; its timeout changes.
        timeout_s: for all that is done with it.
    """

    def __init__(self, peer: socket.socket, timeout_s: float) -> None:
        super().__init__()
        self._peer = peer
        self._deadline = time.monotonic() + timeout_s
        self._known: dict[str, bytes] = {}
        self._settled = False

    def set(self, key: str, value: str | bytes | Sequence[int]) -> None:
        """Set it at both ends."""
        data = self._known[key] = value.encode() if isinstance(value, str) else bytes(value)
        if not self._settled:
            self._send(key, data)

    def get(self, key: str) -> bytes:
        """Its value, as soon as it is set."""
        while key not in self._known:
            if self._settled or not self._take():
                raise ConnectionError(f"{key} was never set")
        return self._known[key]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Returns when all are set."""
        for key in keys:
            self.get(key)

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all are known to be set."""
        return all(key in self._known for key in keys)

    def settle(self) -> None:
        """Nothing more is set here; returns when that is true of the other end too, and the connection is free."""
        self._settled = True
        self._send("", b"")
        while self._take():
            pass

    def _send(self, key: str, value: bytes) -> None:
        name = key.encode()
        self._peer.settimeout(time_left(self._deadline))
        self._peer.sendall(_LENGTHS.pack(len(name), len(value)) + name + value)

    def _take(self) -> bool:
        """One message; whether it sets something."""
        of_key, of_value = _LENGTHS.unpack(self._receive(_LENGTHS.size))
        if of_key > _MAX_KEY or of_value > _MAX_VALUE:
            raise ConnectionError(f"a key of {of_key} and a value of {of_value} bytes are none of a store")
        key = self._receive(of_key).decode(errors="replace")
        self._known[key] = self._receive(of_value)
        return bool(key)

    def _receive(self, length: int) -> bytes:
        return receive_exactly(self._peer, length, self._deadline)
