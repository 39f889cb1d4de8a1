"""Rows between GPUs beside a p2p connection: headers travel by its socket, the rows they speak of by a *lane*.

A lane is two groups of two ranks, one for each direction. NCCL does a group's operations one after the other and knows
no tags, so the order of the headers is the order of the rows; and had both directions one group, two sends could wait
for each other's receive. Nobody else is in these groups: when a peer dies, its lane goes and no other is disturbed.

Rows are posted before the header that tells of them, so whoever has read a header may count on them. Posting never
waits. A thread for each direction waits for what was posted, and an eventfd tells of rows that have come: a loop that
polls sockets polls it as well, and notices a dead peer by the socket while rows are awaited.

NCCL cannot run on a machine without GPUs; there lanes are tested over gloo, in all but the calls that `_post` and
`_wait` make for a GPU.
"""

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from queue import SimpleQueue

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore
from torch.distributed import ProcessGroup

from dispatch.groups import make_group
from dispatch.pair_store import PairStore

CLIENT, SERVER = 0, 1
# The socket tells of a peer that died and the loop's deadline of one that hangs; gloo's own limit would be a third.
_EVER = timedelta(days=365)


class LaneBroken(Exception):
    """Its peer has gone or has never come; the lane is of no use any more."""


class Lane:
    """One end. For one thread, but for close(), which any may call.

    Attributes:
        device: where its rows are.
        fd: readable when the rows that are awaited have come, or never will.
    """

    def __init__(
        self, store: PairStore, rank: int, outward: ProcessGroup, inward: ProcessGroup, device: torch.device
    ) -> None:
        self.device = device
        self._store = store  # the groups may ask it as long as they are
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._peer = 1 - rank
        self._outward: ProcessGroup | None = outward
        self._inward: ProcessGroup | None = inward
        self._closing = threading.Lock()  # a number that is closed may be another file's at once
        self._failure: str | None = None
        self._sent = _Waiter("lane-out", device, self._tell_failure)
        self._received = _Waiter("lane-in", device, self._tell)

    @classmethod
    def form(
        cls, connection: socket.socket, rank: int, device: torch.device, address: str, timeout_s: float = 30.0
    ) -> "Lane":
        """Both ends call it.

        Args:
            connection: between both ends, of no other use meanwhile; does not block afterwards.
            rank: CLIENT or SERVER.
            device: where rows are.
            address: of this host, on which gloo listens.
            timeout_s: for all of it; NCCL takes seconds at its first.

        Raises:
            LaneBroken: it did not come about in time.
        """
        store = PairStore(connection, timeout_s)
        try:
            rows, results = (
                make_group(PrefixStore(way, store), rank, 2, device, address, timeout_s) for way in ("rows", "results")
            )
            # NCCL connects at the first transfer, and then both ends wait: here they may.
            probe = torch.zeros(1, device=device)
            posts = (_send, _receive) if rank == CLIENT else (_receive, _send)
            for group, post in zip((rows, results), posts, strict=True):
                _wait(_post(group, post, probe, 1 - rank), device, timedelta(seconds=timeout_s))
            store.settle()
            connection.setblocking(False)
        except (RuntimeError, OSError) as error:
            raise LaneBroken(f"no way for rows: {error}") from error
        return cls(store, rank, rows, results, device) if rank == CLIENT else cls(store, rank, results, rows, device)

    def send(self, rows_ND: Tensor) -> None:
        """Post these rows, before the header that tells of them; they have to stay as they are. Raises LaneBroken."""
        self._sent.put(self._posted(self._outward, _send, rows_ND), rows_ND)

    def receive(self, room_ND: Tensor) -> None:
        """Await the rows that a header told of; one such at a time. Raises LaneBroken."""
        self._received.put(self._posted(self._inward, _receive, room_ND), room_ND)

    def received(self) -> bool:
        """Whether the awaited rows have come. Raises LaneBroken if they never will."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.fd)
            if self._failure is None:
                return True
        if self._failure is not None:
            raise LaneBroken(self._failure)
        return False

    def close(self) -> None:
        """End it, with whatever is under way; the other end's transfers then fail. May be called again."""
        with self._closing:
            if self._outward is None or self._inward is None:
                return
            if self.device.type == "cuda":
                for group in (self._outward, self._inward):
                    group.abort()  # whoever waits for a dead peer is let go
            # gloo closes a group's connections when it and all of its work are gone.
            self._outward = self._inward = None
            os.close(self.fd)
        self._sent.end()
        self._received.end()

    def _posted(self, group: ProcessGroup | None, post: "_Posting", rows_ND: Tensor) -> dist.Work:
        if group is None:
            raise LaneBroken("it has been closed")
        try:
            return _post(group, post, rows_ND, self._peer)
        except RuntimeError as error:
            raise LaneBroken(str(error)) from error

    def _tell_failure(self, failure: str | None) -> None:
        if failure is not None:
            self._tell(failure)

    def _tell(self, failure: str | None) -> None:
        with self._closing:
            if self._inward is not None:
                self._failure = self._failure or failure
                os.eventfd_write(self.fd, 1)


_Posting = Callable[[ProcessGroup, Tensor, int], dist.Work]


def _send(group: ProcessGroup, rows_ND: Tensor, peer: int) -> dist.Work:
    return group.send([rows_ND], peer, 0)


def _receive(group: ProcessGroup, room_ND: Tensor, peer: int) -> dist.Work:
    return group.recv([room_ND], peer, 0)


def _post(group: ProcessGroup, post: _Posting, rows_ND: Tensor, peer: int) -> dist.Work:
    """As torch's batch_isend_irecv, which takes only groups that were made with a default group."""
    if rows_ND.device.type != "cuda":
        return post(group, rows_ND, peer)
    group._start_coalescing(rows_ND.device)  # alone, NCCL's would make a communicator of their own
    post(group, rows_ND, peer)
    return group._end_coalescing(rows_ND.device)


def _wait(work: dist.Work, device: torch.device, timeout: timedelta = _EVER) -> None:
    """Until it is done, on the device as well; `timeout` is gloo's. Raises RuntimeError."""
    if device.type != "cuda":
        work.wait(timeout)
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # not the one that computes: it shall not wait
    with torch.cuda.stream(stream):
        work.wait()
    stream.synchronize()


class _Waiter:
    """A thread that waits for posted transfers, one after the other, and tells of each end: None, or what went wrong.

    A daemon, since gloo gives up a peer that stands still only with the peer's connection.
    """

    def __init__(self, name: str, device: torch.device, tell: Callable[[str | None], None]) -> None:
        self._posted: SimpleQueue[tuple[dist.Work, Tensor] | None] = SimpleQueue()
        self._device = device
        self._tell = tell
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def put(self, work: dist.Work, rows_ND: Tensor) -> None:
        """`rows_ND` are kept until it is done."""
        self._posted.put((work, rows_ND))

    def end(self) -> None:
        self._posted.put(None)

    def _run(self) -> None:
        while (posted := self._posted.get()) is not None:
            try:
                _wait(posted[0], self._device)
            except RuntimeError as error:
                self._tell(str(error))
                return
            posted = None
            self._tell(None)
