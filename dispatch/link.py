"""One connection from a dispatcher to an expert server, and the batches whose parts travel on it.

Shape legend: T tokens, K top-k, N = T*K rows, D hidden width.
"""

import select
import socket
from array import array
from collections import deque
from typing import TypeAlias

import torch
from torch import Tensor

from dispatch.connections import Connection
from dispatch.pieces import Pieces
from dispatch.wire import (
    DTYPE_CODES,
    HEADER_BYTES,
    Header,
    MalformedMessage,
    decode_entries,
    decode_header,
    encode_answer,
)

Run: TypeAlias = tuple[int, list[int]]  # an expert, and the rows of the batch that go to it


class LinkLost(Exception):
    """The connection is of no use any more; the message says why."""


class Batch:
    """What dispatch() was given, kept until combine(): rows as they lie in memory, and where their results go.

    Attributes:
        micro_batch: how many other batches were under way.
        open_parts: parts without an answer.
        lost_rows: those that no holder could be found for.
    """

    __slots__ = (
        "dtype", "layer", "lost_rows", "micro_batch", "num_rows", "open_parts", "row_bytes", "top_k", "x_TD", "y_TKD",
    )  # fmt: skip

    def __init__(self, x_TD: Tensor, top_k: int, layer: int, micro_batch: int) -> None:
        tokens, width = x_TD.shape
        self.layer = layer
        self.micro_batch = micro_batch
        self.top_k = top_k
        self.num_rows = tokens * top_k
        self.dtype = DTYPE_CODES[x_TD.dtype]
        self.row_bytes = width * x_TD.element_size()
        self.open_parts = 0
        self.lost_rows: list[int] = []
        self.x_TD = x_TD

    def make_room(self) -> None:
        """Room for the results; made when the rows are on their way, since those are what is waited for."""
        tokens, width = self.x_TD.shape
        self.y_TKD = torch.empty((tokens, self.top_k, width), dtype=self.x_TD.dtype, device=self.x_TD.device)

    def results(self) -> Tensor:
        """y_TKD, when no part is open: zeros for lost rows."""
        if self.lost_rows:
            self.y_TKD.view(self.num_rows, -1)[self.lost_rows] = 0
        return self.y_TKD


class Part:
    """What one slot has of a batch.

    Attributes:
        runs: experts and their rows, in the order of travel.
        entries: experts and numbers of rows in turn, as the message has them.
        rows: of all runs.
        refused_by: links that do not hold these experts.
        head: of the message that carries it: header and entries.
    """

    __slots__ = ("batch", "entries", "head", "refused_by", "rows", "runs")

    def __init__(self, batch: Batch, runs: list[Run], refused_by: "frozenset[Link]") -> None:
        self.batch = batch
        self.runs = runs
        self.refused_by = refused_by
        self.head = b""
        self.entries: list[int] = []
        self.rows: list[int] = []
        for expert, rows in runs:
            self.entries += (expert, len(rows))
            self.rows += rows

    @property
    def tokens(self) -> list[int]:
        """Of each of its rows."""
        top_k = self.batch.top_k
        return self.rows if top_k == 1 else [row // top_k for row in self.rows]

    def outgoing(self, head: bytes) -> Pieces:
        """Its message under this head: the rows where they lie."""
        return Pieces(array("B", head), self.batch.x_TD, self.tokens, self.batch.row_bytes)

    def incoming(self, header: "array[int]") -> Pieces:
        """Room for the answer: its header, and where the results go."""
        return Pieces(header, self.batch.y_TKD, self.rows, self.batch.row_bytes)


class Link:
    """Sends parts and receives their results, in the same order. All methods but close() raise LinkLost.

    Attributes:
        fds: whatever it waits for shows at one of these; the first is the socket's.
        awaited: parts that are not answered, oldest first.
        heard_at: when the last byte came, or an idle link was asked.
        heeds: what is to be polled of the socket.
    """

    heeds = select.EPOLLIN

    def __init__(self, connection: Connection) -> None:
        self.slot = connection.slot
        self.incarnation = connection.incarnation
        self.fd = connection.socket.fileno()
        self.fds: tuple[int, ...] = (self.fd,)
        self.awaited: deque[Part] = deque()
        self.heard_at = 0.0
        self._socket: socket.socket = connection.socket
        self._sending: deque[Pieces] = deque()  # what the kernel has not taken
        self._header = array("B", bytes(HEADER_BYTES))
        self._receiving: Pieces | None = None  # room for what the oldest awaited part has yet to get
        self._header_left = HEADER_BYTES
        self._results_header = b""  # the header of the answer that is hoped for
        self._refusal = 0

    def ask(self, part: Part, head: bytes | None, now: float) -> bool:
        """Send a part by its header and entries (None: it gets lost on the way); whether a rest waits for send()."""
        if not self.awaited:
            self.heard_at = now
        self.awaited.append(part)
        if head is not None:
            self._sending.append(self._message(part, head))
            if len(self._sending) == 1:
                return self.send()
        return bool(self._sending)

    def send(self) -> bool:
        """Send what waits, as far as the kernel takes it; whether a rest waits still."""
        while self._sending:
            pieces = self._sending[0]
            try:
                while pieces.left:
                    pieces.write(self.fd)
            except BlockingIOError:
                return True
            except OSError as error:
                raise LinkLost(f"sending failed: {error}") from error
            self._sending.popleft()
        return False

    def prepare(self) -> Pieces | None:
        """Room for what is left of the next answer, if one is awaited; laid out better before it is there than then."""
        if self._receiving is None and self.awaited:
            part = self.awaited[0]
            self._results_header = encode_answer(Header.of(part.head))
            self._receiving = self._room(part)
            self._header_left = HEADER_BYTES
        return self._receiving

    def receive(self, now: float) -> tuple[Part | None, int]:
        """Receive what has come; a part that is answered by now, and the refusal if it is one."""
        room = self.prepare()
        try:
            got = room.read(self.fd) if room else len(self._socket.recv(1))
        except BlockingIOError:
            return None, 0
        except OSError as error:
            raise LinkLost(f"receiving failed: {error}") from error
        if not got:
            raise LinkLost("it closed the connection")
        if room is None:
            raise LinkLost("it sent what nobody asked for")
        self.heard_at = now
        if self._header_left:
            self._header_left = max(self._header_left - got, 0)
            if not self._header_left:
                self._refusal = 0 if self._header.tobytes() == self._results_header else self._why_refused()
        if room.left:
            return None, 0
        self._receiving = None
        return self.awaited.popleft(), self._refusal

    def close(self) -> list[Part]:
        """Close the connection; the parts that it leaves open."""
        self._socket.close()
        return list(self.awaited)

    def _message(self, part: Part, head: bytes) -> Pieces:
        return part.outgoing(head)

    def _room(self, part: Part) -> Pieces:
        return part.incoming(self._header)

    def _why_refused(self) -> int:
        """The refusal of the oldest awaited part."""
        part = self.awaited[0]
        try:
            data = memoryview(self._header)
            header = decode_header(data, part.batch.dtype, part.batch.row_bytes, max_entries=0)
            decode_entries(data, header)
        except MalformedMessage as error:
            raise LinkLost(f"it sent {error}") from error
        refusal = header.refusal
        if not refusal or self._header.tobytes() != encode_answer(Header.of(part.head), refusal):
            raise LinkLost(f"it answers message {header.serial} of step {header.step}, which is not the awaited one")
        return refusal
