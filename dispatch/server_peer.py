"""Who is connected to an expert server: newcomers in their handshake, and peers that send rows."""

import select
import socket

import torch
from torch import Tensor

from dispatch.connections import HELLO_BYTES, Handshake, RowFormat
from dispatch.pieces import MAX_PIECES
from dispatch.requests import Request, Results
from dispatch.wire import (
    DTYPE_CODES,
    HEADER_BYTES,
    MAX_ENTRIES,
    Header,
    Kind,
    MalformedMessage,
    decode_entries,
    decode_header,
)

_BUFFER_BYTES = 64 << 10  # at first; grows to the largest message
_MAX_VIEWS = 256


class PeerGone(Exception):
    """The peer closed the connection, or has to be cut off; the message says why."""

    def __init__(self, reason: str, closed_by_peer: bool = False) -> None:
        super().__init__(reason)
        self.closed_by_peer = closed_by_peer


class Newcomer:
    """A connection whose peer has yet to prove itself."""

    def __init__(self, accepted: socket.socket, handshake: Handshake, since: float) -> None:
        self.socket = accepted
        self.fd = accepted.fileno()
        self.since = since
        self._handshake = handshake
        self._hello = b""

    def send(self, message: bytes) -> bool:
        """Send one of the handshake's few bytes; whether the kernel took them all, as it does for any honest peer."""
        try:
            return self.socket.send(message) == len(message)
        except OSError:
            return False

    def close(self) -> None:
        self.socket.close()

    def receive(self) -> int | None:
        """The source, once it has proved itself; None while its hello is incomplete.

        Raises:
            OSError: it has gone.
            HandshakeFailed: it has to go.
        """
        try:
            more = self.socket.recv(HELLO_BYTES - len(self._hello))
        except BlockingIOError:
            return None
        if not more:
            raise ConnectionResetError("it closed the connection during the handshake")
        self._hello += more
        if len(self._hello) < HELLO_BYTES:
            return None
        verdict, source = self._handshake.answer(self._hello)
        if not self.send(verdict) or source is None:
            raise ConnectionResetError("it sends rows of another width or type or by another way, or takes no verdict")
        return source


class Peer:
    """An attention rank. One message at a time: the next is looked at when the last is answered and the answer taken.

    Attributes:
        fds: whatever it waits for shows at one of these; the first is the socket's.
        heeds: what is to be polled of the socket while nothing is to be sent.
        sending: what the kernel has not taken of the answer.
        asked_at: when its last request was complete.
    """

    heeds = select.EPOLLIN

    def __init__(self, accepted: socket.socket, source: int, rows: RowFormat) -> None:
        self.socket = accepted
        self.fd = accepted.fileno()
        self.fds: tuple[int, ...] = (self.fd,)
        self.source = source
        self._request: Request | None = None
        self.sending: list[memoryview] = []
        self.asked_at = float("-inf")
        self._width = rows.width
        self._dtype = rows.dtype
        self._row_bytes = rows.width * rows.dtype.itemsize
        self._dtype_code = DTYPE_CODES[rows.dtype]
        self._memory = bytearray(_BUFFER_BYTES)
        self._buffer = memoryview(self._memory)
        self._filled = 0
        self._header: Header | None = None  # of the message that is coming in
        self._length = 0  # of that message
        self._views: dict[tuple[int, int], Tensor] = {}  # entries, rows -> the rows of such a message

    @property
    def idle(self) -> bool:
        """It asks nothing now."""
        return self._request is None

    @property
    def request(self) -> Request:
        """What it asks, until that is answered. Its rows lie in this peer's buffer."""
        assert self._request is not None
        return self._request

    def receive(self, now: float) -> bool:
        """Receive what has come; whether a request is complete now. Raises PeerGone."""
        assert self._request is None, "one request at a time"
        try:
            got = self.socket.recv_into(self._buffer[self._filled :])
        except BlockingIOError:
            return False
        except OSError as error:
            raise PeerGone(f"receiving failed: {error}", closed_by_peer=True) from error
        if not got:
            raise PeerGone("it closed the connection", closed_by_peer=True)
        self._filled += got
        return self.look(now)

    def look(self, now: float) -> bool:
        """Whether the bytes received make up a request; see `request`. Raises PeerGone."""
        if self._filled < HEADER_BYTES:
            return False
        try:
            header = self._header or self._decode()
            if self._filled < self._length:
                return False
            experts, counts = decode_entries(self._buffer, header)
        except MalformedMessage as error:
            raise PeerGone(str(error)) from error
        return self._complete(header, experts, counts, now)

    def answer(self, head: bytes | None, results: Results) -> bool:
        """Answer the request by this header (None: the answer gets lost) and what follows it; whether a rest waits for
        flush(). Raises PeerGone."""
        return self._put([] if head is None else [memoryview(head), *results])

    def close(self) -> None:
        self.socket.close()

    def _put(self, pieces: list[memoryview]) -> bool:
        length = self._length
        self._request = self._header = None
        self.sending = pieces
        waits = not self.flush()
        rest = self._filled - length
        if waits:  # the results may lie in the buffer itself
            self._grow(len(self._buffer), at=length)
        elif rest:
            self._buffer[:rest] = self._buffer[length : self._filled]
        self._filled = rest
        return waits

    def flush(self) -> bool:
        """Send what waits; whether all is sent. Raises PeerGone."""
        while self.sending:
            try:
                sent = self.socket.sendmsg(self.sending[:MAX_PIECES])
            except BlockingIOError:
                return False
            except OSError as error:
                raise PeerGone(f"sending failed: {error}", closed_by_peer=True) from error
            self.sending = rest_of(self.sending, sent)
        return True

    def _complete(self, header: Header, experts: tuple[int, ...], counts: tuple[int, ...], now: float) -> bool:
        """All of a message's bytes are here; whether that makes a request."""
        x_ND = self._views.get((header.entries, header.rows))
        if x_ND is None:
            x_ND = self._view(header)
        self._request = Request(header, experts, counts, x_ND)
        self.asked_at = now
        return True

    def _length_of(self, header: Header) -> int:
        """Of the message, on the socket."""
        return header.length

    def _view(self, header: Header) -> Tensor:
        """The rows of a message of this shape, where they lie in the buffer; kept, as shapes come again and again."""
        if len(self._views) >= _MAX_VIEWS:
            self._views.clear()
        count = header.rows * self._width
        x_N = torch.frombuffer(self._memory, dtype=self._dtype, count=count, offset=header.payload_at)
        x_ND = self._views[header.entries, header.rows] = x_N.view(header.rows, self._width)
        return x_ND

    def _decode(self) -> Header:
        header = decode_header(self._buffer, self._dtype_code, self._row_bytes, MAX_ENTRIES)
        if header.kind != Kind.ROWS or header.source != self.source:
            raise MalformedMessage(f"kind {header.kind} from source {header.source}, expected rows from {self.source}")
        self._header, self._length = header, self._length_of(header)
        if self._length > len(self._buffer):
            self._grow(self._length, at=0)
        return header

    def _grow(self, size: int, at: int) -> None:
        """A new buffer, with what the old one has from `at` on."""
        memory = bytearray(size)
        memory[: self._filled - at] = self._buffer[at : self._filled]
        self._memory, self._buffer = memory, memoryview(memory)
        self._views.clear()


def rest_of(pieces: list[memoryview], done: int) -> list[memoryview]:
    """What is left of `pieces` after their first `done` bytes."""
    for place, piece in enumerate(pieces):
        size = len(piece)
        if done < size:
            return [piece[done:], *pieces[place + 1 :]] if done else pieces[place:]
        done -= size
    return []
