"""A peer whose rows travel by a lane, from GPU to GPU: its socket carries headers and entries alone."""

import select
import socket

import torch
from torch import Tensor

from dispatch.connections import RowFormat
from dispatch.lanes import Lane, LaneBroken
from dispatch.requests import Request, Results
from dispatch.server_peer import Peer, PeerGone
from dispatch.wire import Header


class LanePeer(Peer):
    """As Peer. The rows of a request come after its header, and the next header is read when it is answered."""

    def __init__(self, accepted: socket.socket, source: int, rows: RowFormat, lane: Lane) -> None:
        super().__init__(accepted, source, rows)
        self._lane = lane
        self.fds = (self.fd, lane.fd)
        self._arriving: Request | None = None  # its rows are on their way

    def receive(self, now: float) -> bool:
        """See Peer."""
        try:
            came = self._lane.received()
        except LaneBroken as error:
            raise PeerGone(f"its lane broke: {error}", closed_by_peer=True) from error
        if self._arriving is None:
            return super().receive(now)
        if not came:  # so it was the socket that woke us
            raise PeerGone("it closed the connection", closed_by_peer=True)
        self._request, self._arriving = self._arriving, None
        self.heeds, self.asked_at = select.EPOLLIN, now
        return True

    def look(self, now: float) -> bool:
        """See Peer."""
        return self._arriving is None and super().look(now)

    def answer(self, head: bytes | None, results: Results) -> bool:
        """See Peer; a refusal has no rows, and so nothing but its header."""
        if head is not None and isinstance(results, Tensor):
            try:
                self._lane.send(results)
            except LaneBroken as error:
                raise PeerGone(f"its lane broke: {error}", closed_by_peer=True) from error
        return self._put([] if head is None else [memoryview(head)])

    def close(self) -> None:
        self._lane.close()
        super().close()

    def _complete(self, header: Header, experts: tuple[int, ...], counts: tuple[int, ...], now: float) -> bool:
        room_ND = torch.empty((header.rows, self._width), dtype=self._dtype, device=self._lane.device)
        self._arriving = Request(header, experts, counts, room_ND)
        self.heeds = select.EPOLLRDHUP  # the next header has to wait, a death has not
        try:
            self._lane.receive(room_ND)
        except LaneBroken as error:
            raise PeerGone(f"its lane broke: {error}", closed_by_peer=True) from error
        return False

    def _length_of(self, header: Header) -> int:
        return header.payload_at
