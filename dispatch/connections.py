"""Connections of the p2p transport: listening, connecting, and who may speak.

Before anything else both ends prove that they know the cluster's secret, by HMAC-SHA256 over fresh nonces:

    server -> client  challenge  nonce
    client -> server  hello      source, width, dtype, way of the rows, nonce, proof
    server -> client  verdict    1 byte, proof

All three have a fixed length, so nobody can make the other side keep more. Each proof covers a role, both nonces, the
hello, the slot and the incarnation, so that no proof can be sent back to its maker, and a client notices that another
server has taken over a port. Neither side keeps rows secret: the network between hosts has to be the cluster's own.
"""

import contextlib
import hashlib
import hmac
import os
import socket
import stat
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from struct import Struct

import torch

from dispatch.lanes import Lane
from dispatch.receiving import receive_exactly
from dispatch.topology import SlotAddress
from dispatch.wire import DTYPE_CODES

_CHALLENGE = b"HRDR\x01\x00\x00\x00"
_NONCE_BYTES = 32
_PROOF_BYTES = 32
_HELLO = Struct("<IIBB")
CHALLENGE_BYTES = len(_CHALLENGE) + _NONCE_BYTES
HELLO_BYTES = _HELLO.size + _NONCE_BYTES + _PROOF_BYTES
_VERDICT_BYTES = 1 + _PROOF_BYTES
_ACCEPTED, _OTHER_ROWS = b"\x01", b"\x02"

_BUFFER_BYTES = 4 << 20  # the system may allow less
_SILENT_S = 10  # then a peer whose host has fallen off the network counts as gone


class HandshakeFailed(Exception):
    """The peer does not know the secret, is another than was looked for, or computes with other rows."""


@dataclass(frozen=True, slots=True)
class RowFormat:
    """What rows a server computes with, or a client sends: width in elements.

    `lanes_on`: they travel by lanes and lie on this device; None: by the socket, and on the CPU.
    """

    width: int
    dtype: torch.dtype
    lanes_on: torch.device | None = None

    @property
    def code(self) -> tuple[int, int, int]:
        """What both ends have to have in common."""
        return self.width, DTYPE_CODES[self.dtype], int(self.lanes_on is not None)


@dataclass(frozen=True, slots=True)
class Hello:
    """Who asks, and what rows it sends."""

    source: int
    rows: RowFormat

    def pack(self) -> bytes:
        return _HELLO.pack(self.source, *self.rows.code)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who serves, and the cluster's secret."""

    slot: int
    incarnation: str
    secret: bytes = field(repr=False)

    def proof(self, role: bytes, server_nonce: bytes, client_nonce: bytes, hello: bytes) -> bytes:
        """HMAC-SHA256 that shows the secret's knowledge."""
        who = f"{self.slot}/{self.incarnation}".encode()
        return hmac.digest(
            self.secret, b"/".join((b"herder p2p", role, server_nonce, client_nonce, hello, who)), "sha256"
        )


@dataclass(frozen=True, slots=True)
class Connection:
    """An authenticated connection to a slot's server; the socket does not block.

    Attributes:
        lane: by which rows travel, if not by the socket.
    """

    slot: int
    incarnation: str
    socket: socket.socket
    lane: Lane | None = None

    def close(self) -> None:
        self.socket.close()
        if self.lane is not None:
            self.lane.close()


class Listener:
    """The sockets on which an expert server listens.

    Args:
        host: the node's cluster address; nothing else is bound.
        unix_path: also listen on a Unix socket there; one that an earlier life has left there gives way. None: do not.
        incarnation: random name of this life of the server.

    Raises:
        OSError: `host` is no address of this machine.
    """

    def __init__(self, host: str, unix_path: Path | None, incarnation: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        tcp = socket.create_server((host, 0), family=family)
        self.sockets = [tcp]
        self._path = unix_path
        if unix_path is not None:
            unix_path.unlink(missing_ok=True)
            local = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            local.bind(str(unix_path))
            self._inode = unix_path.stat().st_ino
            local.listen(128)
            self.sockets.append(local)
        for listening in self.sockets:
            listening.setblocking(False)
        path = None if unix_path is None else str(unix_path)
        self.address = SlotAddress(incarnation, host, tcp.getsockname()[1], path)

    def close(self) -> None:
        for listening in self.sockets:
            listening.close()
        if self._path is not None:
            with contextlib.suppress(OSError):  # a later life's socket stays, and so does a directory in use
                if self._path.stat().st_ino == self._inode:
                    self._path.unlink()
                self._path.parent.rmdir()


def socket_path(secret: bytes, slot: int) -> Path | None:
    """Where a slot's server listens on this host: one place for each cluster and slot, whatever becomes of its process.

    None where this user has no directory that only it can enter.
    """
    name = hashlib.sha256(b"herder sockets" + secret).hexdigest()[:16]
    directory = Path(tempfile.gettempdir()) / f"herder-{os.getuid()}-{name}"
    directory.mkdir(mode=0o700, exist_ok=True)
    found = directory.lstat()
    private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return directory / f"slot-{slot}" if private else None


class Handshake:
    """The server's part of one handshake; moves no bytes itself.

    Args:
        identity: of the server.
        rows: that it computes with.
    """

    def __init__(self, identity: Identity, rows: RowFormat) -> None:
        self._identity = identity
        self._rows = rows.code
        self._nonce = os.urandom(_NONCE_BYTES)
        self.challenge = _CHALLENGE + self._nonce

    def answer(self, hello: bytes) -> tuple[bytes, int | None]:
        """The verdict to send on HELLO_BYTES bytes, and the source; None if its rows are others and it has to go.

        Raises:
            HandshakeFailed: the proof is wrong; nothing is to be sent.
        """
        said = hello[: _HELLO.size]
        client_nonce = hello[_HELLO.size : -_PROOF_BYTES]
        expected = self._identity.proof(b"client", self._nonce, client_nonce, said)
        if not hmac.compare_digest(expected, hello[-_PROOF_BYTES:]):
            raise HandshakeFailed("a peer does not know the cluster's secret, or takes this slot for another")
        source, *rows = _HELLO.unpack(said)
        verdict, speaker = (_ACCEPTED, source) if tuple(rows) == self._rows else (_OTHER_ROWS, None)
        return verdict + self._identity.proof(b"server" + verdict, self._nonce, client_nonce, said), speaker


def connect(
    slot: int,
    address: SlotAddress,
    hello: Hello,
    secret: bytes,
    timeout_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> Connection:
    """Connect to a slot's server and prove each other the secret; by its Unix socket if that is on this host.

    Args:
        timeout_s: for all of it.

    Raises:
        OSError: it cannot be reached in time (TimeoutError) or closed the connection.
        HandshakeFailed: it is not the server that was looked for, or it computes with other rows.
    """
    deadline = clock() + timeout_s
    identity = Identity(slot, address.incarnation, secret)
    peer = _open(address, timeout_s)
    try:
        challenge = receive_exactly(peer, CHALLENGE_BYTES, deadline, clock)
        if not challenge.startswith(_CHALLENGE):
            raise HandshakeFailed(f"slot {slot} at {address.host}:{address.port} is no expert server")
        server_nonce, client_nonce, said = challenge[len(_CHALLENGE) :], os.urandom(_NONCE_BYTES), hello.pack()
        peer.sendall(said + client_nonce + identity.proof(b"client", server_nonce, client_nonce, said))
        answer = receive_exactly(peer, _VERDICT_BYTES, deadline, clock)
        verdict = answer[:1]
        expected = identity.proof(b"server" + verdict, server_nonce, client_nonce, said)
        if not hmac.compare_digest(expected, answer[1:]):
            raise HandshakeFailed(f"slot {slot}'s server does not know the cluster's secret")
        if verdict != _ACCEPTED:
            raise HandshakeFailed(
                f"slot {slot} computes with rows of another width or type, or by another way, than {hello}"
            )
        peer.setblocking(False)
        return Connection(slot, address.incarnation, peer)
    except BaseException:
        peer.close()
        raise


def _open(address: SlotAddress, timeout_s: float) -> socket.socket:
    if address.unix_path is not None and Path(address.unix_path).exists():
        peer, target = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), address.unix_path
    else:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        peer, target = socket.socket(family, socket.SOCK_STREAM), (address.host, address.port)  # type: ignore[assignment]
    try:
        peer.settimeout(timeout_s)
        peer.connect(target)
        tune(peer)
    except BaseException:
        peer.close()
        raise
    return peer


def tune(peer: socket.socket) -> None:
    """Set what a connected socket needs.

    Unix: room for a whole message of a few hundred rows, so that its sender is seldom woken before all is sent; TCP
    finds its own room. TCP: small messages at once, and an end when the other host falls silent.
    """
    if peer.family == socket.AF_UNIX:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            peer.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
        return
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENT_S * 1000)
