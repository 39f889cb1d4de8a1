"""One connection from a dispatcher to an expert server, and the batches whose parts travel on it.

Shape legend: T tokens, K top-k, N = T*K rows, D hidden width.
"""

import socket
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from dispatch.connections import Connection
from dispatch.requests import as_bytes
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
MAX_PIECES = 1024  # of one sendmsg or recvmsg, by the system's limit


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
        "dtype", "layer", "lost_rows", "micro_batch", "num_rows", "open_parts", "row_bytes", "top_k", "x_TD", "x_bytes",
        "y_TKD", "y_bytes",
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
        if self.num_rows:
            self.x_bytes = as_bytes(x_TD)

    def make_room(self) -> None:
        """Room for the results; made when the rows are on their way, since those are what is waited for."""
        tokens, width = self.x_TD.shape
        self.y_TKD = torch.empty((tokens, self.top_k, width), dtype=self.x_TD.dtype)
        if self.num_rows:
            self.y_bytes = as_bytes(self.y_TKD)

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

    def rows_sent(self) -> list[memoryview]:
        """The rows where they lie."""
        x, size, top_k = self.batch.x_bytes, self.batch.row_bytes, self.batch.top_k
        return [x[(at := row // top_k * size) : at + size] for row in self.rows]

    def rows_received(self) -> list[memoryview]:
        """Where the rows' results go."""
        y, size = self.batch.y_bytes, self.batch.row_bytes
        return [y[(at := row * size) : at + size] for row in self.rows]


class Link:
    """Sends parts and receives their results, in the same order. All methods but close() raise LinkLost.

    Attributes:
        awaited: parts that are not answered, oldest first.
        heard_at: when the last byte came, or an idle link was asked.
    """

    def __init__(self, connection: Connection) -> None:
        self.slot = connection.slot
        self.incarnation = connection.incarnation
        self.fd = connection.socket.fileno()
        self.awaited: deque[Part] = deque()
        self.heard_at = 0.0
        self.sending: list[memoryview] = []
        self._socket: socket.socket = connection.socket
        self._header = memoryview(bytearray(HEADER_BYTES))
        self._receiving: list[memoryview] = []  # room for what the oldest awaited part has yet to get
        self._header_left = HEADER_BYTES
        self._results_header = b""  # the header of the answer that is hoped for
        self._refusal = 0

    def ask(self, part: Part, head: bytes | None, now: float) -> bool:
        """Send a part by its header and entries (None: it gets lost on the way); whether a rest waits for send()."""
        if not self.awaited:
            self.heard_at = now
        self.awaited.append(part)
        if head is not None:
            pieces = [memoryview(head), *part.rows_sent()]
            if self.sending:
                self.sending += pieces
            else:
                self.sending = pieces
                return self.send()
        return bool(self.sending)

    def send(self) -> bool:
        """Send what waits, as far as the kernel takes it; whether a rest waits still."""
        while self.sending:
            try:
                sent = self._socket.sendmsg(self.sending[:MAX_PIECES])
            except BlockingIOError:
                return True
            except OSError as error:
                raise LinkLost(f"sending failed: {error}") from error
            self.sending = rest_of(self.sending, sent)
        return False

    def prepare(self) -> None:
        """Lay out room for the next answer, if one is awaited: better while it is waited for than when it is there."""
        if self._receiving or not self.awaited:
            return
        part = self.awaited[0]
        self._results_header = encode_answer(Header.of(part.head))
        self._receiving = [self._header, *part.rows_received()]
        self._header_left = HEADER_BYTES

    def receive(self, now: float) -> tuple[Part | None, int]:
        """Receive what has come; a part that is answered by now, and the refusal if it is one."""
        if not self.awaited:
            self._read(lambda: self._socket.recv(1))
            raise LinkLost("it sent what nobody asked for")
        self.prepare()
        got = self._read(lambda: self._socket.recvmsg_into(self._receiving[:MAX_PIECES])[0])
        if not got:
            return None, 0
        self.heard_at = now
        if self._header_left:
            self._header_left = max(self._header_left - got, 0)
            if not self._header_left:
                self._refusal = 0 if self._header == self._results_header else self._why_refused()
        self._receiving = rest_of(self._receiving, got)
        if self._receiving:
            return None, 0
        return self.awaited.popleft(), self._refusal

    def close(self) -> list[Part]:
        """Close the connection; the parts that it leaves open."""
        self._socket.close()
        return list(self.awaited)

    def _read(self, read: Callable[[], int | bytes]) -> int:
        try:
            got = read()
        except BlockingIOError:
            return 0
        except OSError as error:
            raise LinkLost(f"receiving failed: {error}") from error
        if not got:
            raise LinkLost("it closed the connection")
        return got if isinstance(got, int) else len(got)

    def _why_refused(self) -> int:
        """The refusal of the oldest awaited part."""
        part = self.awaited[0]
        try:
            header = decode_header(self._header, part.batch.dtype, part.batch.row_bytes, max_entries=0)
            decode_entries(self._header, header)
        except MalformedMessage as error:
            raise LinkLost(f"it sent {error}") from error
        refusal = header.refusal
        if not refusal or self._header != encode_answer(Header.of(part.head), refusal):
            raise LinkLost(f"it answers message {header.serial} of step {header.step}, which is not the awaited one")
        return refusal


def rest_of(pieces: list[memoryview], done: int) -> list[memoryview]:
    """What is left of `pieces` after their first `done` bytes."""
    for place, piece in enumerate(pieces):
        size = len(piece)
        if done < size:
            return [piece[done:], *pieces[place + 1 :]] if done else pieces[place:]
        done -= size
    return []
