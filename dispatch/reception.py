"""How peers come to an expert server: they connect, prove themselves in two seconds, and form a lane if rows need one.

Nothing here blocks the server's loop, in whose poll all of it is registered; a lane is formed on a thread of its own,
since both ends wait for each other.
"""

import contextlib
import logging
import select
import socket
import threading
import uuid
from collections import deque
from collections.abc import Callable, Sequence

from dispatch.connections import Handshake, HandshakeFailed, Identity, Listener, RowFormat, socket_path, tune
from dispatch.lane_peer import LanePeer
from dispatch.lanes import SERVER, Lane, LaneBroken
from dispatch.server_peer import Newcomer, Peer
from dispatch.topology import SlotAddress

_log = logging.getLogger(__name__)
_MAX_NEWCOMERS = 64
_HANDSHAKE_S = 2.0


class Reception:
    """Of one server. For the loop's thread, but for `address` and wake().

    Args:
        poll: the loop's.
        slot, rows, secret, host, unix, clock: see ExpertServer.

    Raises:
        OSError: `host` is no address of this machine.
    """

    def __init__(
        self,
        poll: select.epoll,
        slot: int,
        rows: RowFormat,
        secret: bytes,
        host: str,
        unix: bool,
        clock: Callable[[], float],
    ) -> None:
        self._poll = poll
        self._rows = rows
        self._host = host
        self._clock = clock
        self._identity = Identity(slot, uuid.uuid4().hex, secret)
        self._listener = Listener(host, socket_path(secret, slot) if unix else None, self._identity.incarnation)
        self._listening = {listening.fileno(): listening for listening in self._listener.sockets}
        self._newcomers: dict[int, Newcomer] = {}  # by fd, oldest first
        self._formed: deque[Peer] = deque()  # their lanes are there since
        self._closed = False
        self._woken, self._waker = socket.socketpair()
        for end in (self._woken, self._waker):
            end.setblocking(False)
        self.address: SlotAddress = self._listener.address
        for fd in (self._woken.fileno(), *self._listening):
            poll.register(fd, select.EPOLLIN)

    def wake(self) -> None:
        """Let the loop's poll return. From any thread."""
        with contextlib.suppress(OSError):  # the loop has ended, or has many such wishes to read
            self._waker.send(b"\0")

    def patience(self) -> float | None:
        """Seconds until a handshake is overdue; None if there is none."""
        oldest = next(iter(self._newcomers.values()), None)
        return None if oldest is None else max(oldest.since + _HANDSHAKE_S - self._clock(), 0.0)

    def attend(self, fd: int) -> Sequence[Peer]:
        """Something has come by this, which is no peer's; who may ask from now on, all `fds` of which are polled."""
        if (newcomer := self._newcomers.get(fd)) is not None:
            return self._greet(newcomer)
        if fd in self._listening:
            self._accept(self._listening[fd])
        elif fd == self._woken.fileno():
            return self._welcome()
        return ()

    def turn_late_ones_away(self) -> None:
        """Those that have not proved themselves in time."""
        if self._newcomers:
            now = self._clock()
            for newcomer in [n for n in self._newcomers.values() if now - n.since >= _HANDSHAKE_S]:
                self._turn_away(newcomer)

    def close(self) -> None:
        """Whoever is no peer yet is cut off."""
        self._closed = True
        for newcomer in self._newcomers.values():
            newcomer.close()
        self._newcomers.clear()
        while self._formed:  # a thread may add to it
            self._formed.popleft().close()
        self._listener.close()
        self._woken.close()
        self._waker.close()

    def _accept(self, listening: socket.socket) -> None:
        try:
            accepted, _ = listening.accept()
        except OSError:  # it has gone again
            return
        accepted.setblocking(False)
        tune(accepted)
        if len(self._newcomers) == _MAX_NEWCOMERS:  # the oldest: an honest one needs a millisecond
            self._turn_away(next(iter(self._newcomers.values())))
        handshake = Handshake(self._identity, self._rows)
        newcomer = self._newcomers[accepted.fileno()] = Newcomer(accepted, handshake, self._clock())
        self._poll.register(accepted.fileno(), select.EPOLLIN)
        if not newcomer.send(handshake.challenge):
            self._turn_away(newcomer)

    def _greet(self, newcomer: Newcomer) -> Sequence[Peer]:
        try:
            source = newcomer.receive()
        except (HandshakeFailed, OSError) as error:
            _log.warning("slot %d turns a peer away: %s", self._identity.slot, error)
            self._turn_away(newcomer)
            return ()
        if source is None:
            return ()
        del self._newcomers[newcomer.fd]
        if self._rows.lanes_on is None:
            return (Peer(newcomer.socket, source, self._rows),)
        self._poll.unregister(newcomer.fd)
        threading.Thread(target=self._form_lane, args=(newcomer, source), name="form-lane", daemon=True).start()
        return ()

    def _turn_away(self, newcomer: Newcomer) -> None:
        del self._newcomers[newcomer.fd]
        self._poll.unregister(newcomer.fd)
        newcomer.close()

    def _form_lane(self, newcomer: Newcomer, source: int) -> None:
        """On a thread of its own."""
        assert self._rows.lanes_on is not None
        try:
            lane = Lane.form(newcomer.socket, SERVER, self._rows.lanes_on, self._host)
        except LaneBroken as error:
            _log.warning("slot %d parts from attention %d: %s", self._identity.slot, source, error)
            newcomer.close()
            return
        peer = LanePeer(newcomer.socket, source, self._rows, lane)
        self._formed.append(peer)
        self.wake()
        if self._closed:  # perhaps nobody looks any more
            peer.close()

    def _welcome(self) -> Sequence[Peer]:
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(4096)
        peers = []
        while self._formed:
            peers.append(peer := self._formed.popleft())
            for fd in peer.fds:
                self._poll.register(fd, select.EPOLLIN)
        return peers
