"""A slot's side of the p2p transport: serves whoever comes, one thread, one loop.

Rows that have arrived for the same layer are computed together, because an expert's weights are then read once for all
of them. If other sources were active just now, their rows are waited for, but not longer than `batch_wait_s` and a part
of what the computation takes: waiting for company has to cost less than it can save.

Nothing here blocks on one client. A client whose answers it does not take is not read from until it has taken them;
one that sends nonsense is cut off; one that does not prove the secret within two seconds too.
"""

import logging
import select
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dispatch.connections import RowFormat
from dispatch.faults import Faults
from dispatch.reception import Reception
from dispatch.requests import Request, Results, compute_on_device, compute_together
from dispatch.routing import GroupedExperts
from dispatch.server_peer import Peer, PeerGone
from dispatch.stats import ServerStats
from dispatch.topology import SlotAddress
from dispatch.wire import Refusal, encode_answer, refusal_text

_log = logging.getLogger(__name__)
_ACTIVE_S = 0.01  # a source that has asked within this time is likely to ask again soon
_WAIT_SHARE = 0.25  # of a computation's time, at most, is spent waiting for company
_SMOOTHING = 0.1


@dataclass(frozen=True, slots=True)
class _Allowed:
    held: Mapping[int, frozenset[int]]
    min_epoch: int


class ExpertServer:
    """Serves until stop(). run() needs a thread of its own; `allow`, `stop` and reading are for any.

    Args:
        experts: computes.
        slot: this server's slot.
        width, dtype: of a row.
        secret: the cluster's; who does not know it is not served.
        host: the node's cluster address; nothing else is listened on.
        unix: also listen on a Unix socket.
        batch_wait_s: the longest wait for other sources' rows of the same layer.
        lanes_on: rows travel by lanes, and are computed on this device; None: by the sockets, and on the CPU.
        faults: what shall go wrong, for tests and drills.

    Attributes:
        stats: running counts.
        faults: may be set by any thread.

    Raises:
        OSError: `host` is no address of this machine.
    """

    def __init__(
        self,
        experts: GroupedExperts,
        slot: int,
        width: int,
        dtype: torch.dtype,
        secret: bytes,
        host: str,
        unix: bool = True,
        batch_wait_s: float = 0.0003,
        lanes_on: torch.device | None = None,
        faults: Faults | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stats = ServerStats()
        self._experts = experts
        self._compute_together: Callable[[GroupedExperts, int, Sequence[Request]], Sequence[Results]] = (
            compute_together if lanes_on is None else compute_on_device
        )
        self._slot = slot
        self._batch_wait_s = batch_wait_s
        self.faults = faults
        self._clock = clock
        self._allowed = _Allowed({}, 0)
        self._peers: dict[int, Peer] = {}  # by fd
        self._waiting: list[Peer] = []  # with a request that is not computed, oldest first
        self._compute_s = 0.0  # of one batch, smoothed
        self._stopping = False
        self._poll = select.epoll()
        self._reception = Reception(self._poll, slot, RowFormat(width, dtype, lanes_on), secret, host, unix, clock)

    @property
    def address(self) -> SlotAddress:
        """Where it listens; the incarnation is this object's own."""
        return self._reception.address

    def allow(self, held: Mapping[int, tuple[int, ...]], min_epoch: int) -> None:
        """From now on, answer messages of `min_epoch` or later for experts `held` (layer -> experts); refuse others."""
        for layer, experts in held.items():
            rows = self.stats.rows.setdefault(layer, {})
            for expert in experts:
                rows.setdefault(expert, 0)
        self._allowed = _Allowed({layer: frozenset(experts) for layer, experts in held.items()}, min_epoch)

    def run(self) -> None:
        """Serve until stop(); then everything is closed."""
        try:
            with torch.inference_mode():
                while not self._stopping:
                    self._take_in(0 if self._waiting else self._reception.patience())
                    if self._waiting:
                        self._wait_for_company()
                        self._serve_layer()
        finally:
            self._close()

    def stop(self) -> None:
        """End run() after what it is computing. May be called again."""
        self._stopping = True
        self._reception.wake()

    # ---- what comes in

    def _take_in(self, timeout_s: float | None) -> None:
        """Wait for events and handle them; adds to `_waiting`."""
        for fd, events in self._poll.poll(timeout_s):
            if (peer := self._peers.get(fd)) is not None:
                self._attend(peer, events)
            else:
                for newcomer in self._reception.attend(fd):
                    self._peers.update(dict.fromkeys(newcomer.fds, newcomer))
        self._reception.turn_late_ones_away()

    def _attend(self, peer: Peer, events: int) -> None:
        heeded = select.EPOLLOUT if peer.sending else peer.heeds
        try:
            if events & select.EPOLLOUT and peer.flush() and peer.look(self._clock()):
                self._waiting.append(peer)
            if peer.idle and not peer.sending and peer.receive(self._clock()):
                self._waiting.append(peer)
        except PeerGone as error:
            self._part_from(peer, error)
        else:
            self._heed(peer, heeded)

    def _heed(self, peer: Peer, heeded: int) -> None:
        """Poll its socket for what it waits for by now, if that is no longer what it was."""
        heeds = select.EPOLLOUT if peer.sending else peer.heeds
        if heeds != heeded:
            self._poll.modify(peer.fd, heeds)

    def _part_from(self, peer: Peer, error: PeerGone) -> None:
        if not error.closed_by_peer:
            _log.warning("slot %d cuts attention %d off: %s", self._slot, peer.source, error)
        if peer in self._waiting:
            self._waiting.remove(peer)
        for fd in peer.fds:
            del self._peers[fd]
            self._poll.unregister(fd)
        peer.close()

    def _wait_for_company(self) -> None:
        """If other sources were active just now, let their rows arrive too."""
        patience = min(self._batch_wait_s, _WAIT_SHARE * self._compute_s)
        if len(self._peers) < 2 or patience < 2e-5:
            return
        now = self._clock()
        until = now + patience
        while now < until:
            expected = any(p.idle and now - p.asked_at < _ACTIVE_S for p in self._peers.values())
            # epoll's own timeout is in whole milliseconds
            if not expected or not select.select([self._poll], [], [], until - now)[0]:
                return
            before = len(self._waiting)
            self._take_in(0)
            if len(self._waiting) == before:
                return
            now = self._clock()

    # ---- what is computed

    def _serve_layer(self) -> None:
        """Answer all waiting requests of the layer of the oldest; those of other layers keep their order."""
        layer = self._waiting[0].request.header.layer
        peers = [peer for peer in self._waiting if peer.request.header.layer == layer]
        self._waiting = [peer for peer in self._waiting if peer.request.header.layer != layer]
        served = []
        for peer in peers:
            refusal = self._why_not(peer.request)
            if refusal is not None:
                self._refuse(peer, refusal, refusal.name)
            else:
                served.append(peer)
        if served:
            self._compute(layer, served)

    def _why_not(self, request: Request) -> Refusal | None:
        allowed = self._allowed
        if request.header.epoch < allowed.min_epoch:
            return Refusal.STALE_EPOCH
        if not allowed.held.get(request.header.layer, frozenset()).issuperset(request.experts):
            return Refusal.NOT_HELD
        return None

    def _compute(self, layer: int, peers: list[Peer]) -> None:
        requests = [peer.request for peer in peers]
        start = self._clock()
        try:
            results = self._compute_together(self._experts, layer, requests)
        except Exception:
            _log.exception("slot %d: the experts of layer %d failed", self._slot, layer)
            for peer in peers:
                self._refuse(peer, Refusal.FAILED, "the experts failed")
            return
        took = self._clock() - start
        for peer, found in zip(peers, results, strict=True):
            self._answer(peer, encode_answer(peer.request.header), found)
        self._compute_s += _SMOOTHING * (took - self._compute_s)
        self.stats.count(layer, requests)

    def _refuse(self, peer: Peer, refusal: Refusal, text: str) -> None:
        asked = peer.request.header
        self.stats.refused += 1
        self._answer(peer, encode_answer(asked, refusal), [memoryview(refusal_text(text, asked))])

    def _answer(self, peer: Peer, head: bytes, results: Results) -> None:
        header = peer.request.header
        struck: bytes | None = head
        if self.faults is not None:
            struck = self.faults.strike(header.step, header.layer, head)
        heeded = peer.heeds
        try:
            if not peer.answer(struck, results) and peer.look(self._clock()):  # its next request has come with the last
                self._waiting.append(peer)
        except PeerGone as error:
            self._part_from(peer, error)
        else:
            self._heed(peer, heeded)

    def _close(self) -> None:
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()
        self._reception.close()
        self._poll.close()
