"""Dispatch straight to the expert servers over sockets: no collective, no lockstep with other attention ranks.

A row is one (token, k) pair; row r is of token r // K. Rows are sorted by slot and expert on paper only: the kernel
gathers them from x_TD where they lie (writev) and scatters the results to where they belong (readv), so nothing is
permuted and nothing copied. For that x_TD has to stay as it is until combine(). Between GPUs they go by lanes, after a
permute on the device; see lane_link.py.

Each message to a slot is a *part* of a batch. A slot that is lost (its connection ends, it sends nonsense, or is silent
for the deadline) gives its open parts back, and each expert's run of rows in them goes to another holder. Experts have
no state, so it does not matter that the first holder may have computed them. A row whose expert no reachable slot holds
comes back as zeros, and take_lost() tells its token.

All sockets are non-blocking, and whoever waits to send also receives: no ring of full buffers can stand still.

Shape legend: T tokens, K top-k, N = T*K rows, D hidden width, E logical experts.
"""

import select
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from torch import Tensor

from dispatch.connections import Connection
from dispatch.faults import Faults
from dispatch.lane_link import LaneLink
from dispatch.link import Batch, Link, LinkLost, Part, Run
from dispatch.routing import share_out
from dispatch.stats import P2PStats
from dispatch.topology import Topology
from dispatch.wire import MAX_ROWS, Refusal, encode_rows

_NOBODY: frozenset[Link] = frozenset()


class P2PDispatcher:
    """An attention rank's side. For one thread, but for `connected`.

    Args:
        source: this attention rank.
        deadline_s: seconds that a slot may leave awaited results without a further byte.
        on_lost: called once for each lost connection with slot, incarnation and reason; must not block.
        faults: what shall go wrong, for tests and drills.

    Attributes:
        connected: slot -> incarnation of the server that is connected; replaced as a whole, so any thread may read it.
        stats: running counts, from the first topology on.
        faults: may be set by any thread.
    """

    def __init__(
        self,
        source: int,
        deadline_s: float,
        on_lost: Callable[[int, str, str], None],
        faults: Faults | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.source = source
        self.stats = P2PStats()
        self.connected: Mapping[int, str] = MappingProxyType({})
        self._deadline_s = deadline_s
        self._on_lost = on_lost
        self.faults = faults
        self._clock = clock
        self._topology: Topology | None = None
        self._links: dict[int, Link] = {}  # by slot
        self._by_fd: dict[int, Link] = {}
        self._poll = select.epoll()
        self._holders: dict[int, list[list[Link]]] = {}  # layer -> expert -> connected holders
        self._turn = source
        self._step = 0
        self._serial = 0
        self._under_way: set[Batch] = set()
        self._sending: set[Link] = set()  # those whose kernel buffers are full
        self._orphans: deque[Part] = deque()
        self._lost: list[tuple[int, int]] = []  # of combined batches: row, rows of its batch
        self._counts: dict[int, memoryview] = {}  # stats.rows_E, cheap to add to

    @property
    def epoch(self) -> int | None:
        """Of the installed topology, if any."""
        return None if self._topology is None else self._topology.epoch

    def install(self, topology: Topology, connections: Sequence[Connection]) -> None:
        """Take up a topology, between steps.

        Connections to servers that it does not name are closed, and so are surplus ones among `connections`.
        """
        if self._topology is None:
            self.stats.rows_E.update(P2PStats.of(topology.expert_map).rows_E)
            self._counts = {layer: rows_E.numpy().data for layer, rows_E in self.stats.rows_E.items()}
        self._topology = topology
        named = {slot: address.incarnation for slot, address in topology.addresses.items()}
        for slot, link in list(self._links.items()):
            if named.get(slot) != link.incarnation:
                self._drop(link)
        for connection in connections:
            slot = connection.slot
            if named.get(slot) != connection.incarnation or slot in self._links:
                connection.close()
                continue
            link = self._links[slot] = Link(connection) if connection.lane is None else LaneLink(connection)
            for fd in link.fds:
                self._by_fd[fd] = link
                self._poll.register(fd, select.EPOLLIN)
        self._connections_changed()
        self._rehome()

    def begin_step(self) -> None:
        """A step begins; whatever an earlier one has left uncombined is forgotten."""
        self._step += 1
        self._under_way.clear()

    def dispatch(self, x_TD: Tensor, expert_ids_TK: Tensor, layer: int) -> Batch:
        """Send each row to a connected holder of its expert; returns when all is handed to the kernel.

        Args:
            x_TD: rows of the servers' width and type, on the CPU or, with lanes, on theirs; not to be changed before
                combine().
            expert_ids_TK: integers from 0 to E-1; K >= 1.
            layer: an MoE layer of the expert map.

        Raises:
            ValueError: more than MAX_ROWS rows, or no such layer.
        """
        if layer not in self._holders:
            raise ValueError(f"layer {layer} is no MoE layer of the topology, or none is installed")
        batch = Batch(x_TD.contiguous(), expert_ids_TK.shape[1], layer, micro_batch=len(self._under_way))
        if batch.num_rows > MAX_ROWS:
            raise ValueError(f"a batch has at most {MAX_ROWS} rows, got {batch.num_rows}")
        self._under_way.add(batch)
        if batch.num_rows:
            self._turn += 1
            routes = share_out(expert_ids_TK, self._holders[layer], self._turn)
            for link, runs in routes.items():
                if link is None:
                    self._give_up(batch, [row for _, rows in runs for row in rows])
                    continue
                self._send(link, Part(batch, runs, _NOBODY))
            batch.make_room()
            for link in routes:
                if link is not None:
                    link.prepare()
            counts = self._counts[layer]
            for runs in routes.values():
                for expert, rows in runs:
                    counts[expert] += len(rows)
            if self._orphans:
                self._rehome()
            while self._sending:
                self._pump()
        else:
            batch.make_room()
        return batch

    def combine(self, ticket: Batch) -> Tensor:
        """Wait for the results of a dispatched batch: y_TKD, unscaled, in the tokens' order.

        Raises:
            ValueError: the ticket has been combined already, or its step is over.
        """
        if ticket not in self._under_way:
            raise ValueError(f"this batch of layer {ticket.layer} has been combined already")
        self._under_way.remove(ticket)
        if ticket.open_parts:
            start = self._clock()
            while ticket.open_parts:
                self._pump()
            self.stats.wait_s += self._clock() - start
        self._lost += [(row, ticket.num_rows) for row in ticket.lost_rows]
        return ticket.results()

    def take_lost(self, num_tokens: int) -> frozenset[int]:
        """Tokens, out of the `num_tokens` of each batch combined since the last call, of which a row came back as zeros
        because no holder of its expert could be reached."""
        lost, self._lost = self._lost, []
        return frozenset(row * num_tokens // rows for row, rows in lost)

    def close(self) -> None:
        """Close all connections. May be called again."""
        for link in list(self._links.values()):
            self._drop(link)
        self._orphans.clear()
        self._connections_changed()
        self._poll.close()

    # ---- where rows go

    def _rehome(self) -> None:
        """Find other holders for the parts that lost slots or refusals have left."""
        while self._orphans:
            part = self._orphans.popleft()
            part.batch.open_parts -= 1
            holders = self._holders[part.batch.layer]
            runs: dict[Link, list[Run]] = {}
            for expert, rows in part.runs:
                links = [link for link in holders[expert] if link not in part.refused_by]
                if links:
                    self._turn += 1
                    self.stats.resent_rows += len(rows)
                    runs.setdefault(links[self._turn % len(links)], []).append((expert, rows))
                else:
                    self._give_up(part.batch, rows)
            for link, found in runs.items():
                self._send(link, Part(part.batch, found, part.refused_by))

    def _give_up(self, batch: Batch, rows: list[int]) -> None:
        batch.lost_rows += rows
        self.stats.lost_rows += len(rows)

    def _connections_changed(self) -> None:
        self.connected = MappingProxyType({slot: link.incarnation for slot, link in self._links.items()})
        if self._topology is not None:
            self._holders = {
                layer: [[self._links[slot] for slot in slots if slot in self._links] for slots in experts]
                for layer, experts in self._topology.expert_map.slots.items()
            }

    # ---- what travels

    def _send(self, link: Link, part: Part) -> None:
        """Hand a part to the kernel, or to the link what the kernel does not take; a lost link's part is an orphan."""
        batch = part.batch
        batch.open_parts += 1
        if self._links.get(link.slot) is not link:
            self._orphans.append(part)
            return
        assert self._topology is not None
        self._serial += 1
        rows = len(part.rows)
        place = self._step, self._serial, batch.layer, batch.micro_batch, self.source
        part.head = encode_rows(part.entries, batch.dtype, self._topology.epoch, *place, rows, batch.row_bytes)
        head: bytes | None = part.head
        if self.faults is not None:
            head = self.faults.strike(self._step, batch.layer, part.head)
        try:
            unsent = link.ask(part, head, self._clock())
        except LinkLost as loss:
            self._lose(link, str(loss))
            return
        self.stats.bytes_sent += rows * batch.row_bytes
        if unsent:
            self._sending.add(link)
            self._heed(link)

    def _pump(self) -> None:
        """Wait until something can be received or sent, or a deadline is past; do it."""
        deadline = self._next_deadline()
        for fd, events in self._poll.poll(max(deadline - self._clock(), 0.0)):
            link = self._by_fd.get(fd)
            if link is None:
                continue
            try:
                if events & select.EPOLLOUT and not link.send():
                    self._sending.discard(link)
                    self._heed(link)
                if events & ~select.EPOLLOUT:
                    self._receive(link)
            except LinkLost as loss:
                self._lose(link, str(loss))
        now = self._clock()
        if now >= deadline:
            for link in [link for link in self._links.values() if link.awaited]:
                if now - link.heard_at >= self._deadline_s:
                    self._lose(link, f"silent for {self._deadline_s:g} s")
        if self._orphans:
            self._rehome()

    def _next_deadline(self) -> float:
        """When a link will have been silent for too long; there is one that is awaited."""
        return min(link.heard_at for link in self._links.values() if link.awaited) + self._deadline_s

    def _heed(self, link: Link) -> None:
        """Poll its socket for what it waits for by now."""
        self._poll.modify(link.fd, link.heeds | (select.EPOLLOUT if link in self._sending else 0))

    def _receive(self, link: Link) -> None:
        heeded = link.heeds
        part, refusal = link.receive(self._clock())
        if link.heeds != heeded:
            self._heed(link)
        if part is None:
            return
        if not refusal:
            part.batch.open_parts -= 1
            self.stats.bytes_received += len(part.rows) * part.batch.row_bytes
            return
        part.refused_by |= {link}
        self._orphans.append(part)
        if refusal == Refusal.FAILED:
            raise LinkLost("its experts failed")

    def _lose(self, link: Link, reason: str) -> None:
        self.stats.losses += 1
        self._drop(link)
        self._connections_changed()
        self._on_lost(link.slot, link.incarnation, reason)

    def _drop(self, link: Link) -> None:
        del self._links[link.slot]
        self._sending.discard(link)
        for fd in link.fds:
            del self._by_fd[fd]
            self._poll.unregister(fd)
        self._orphans += link.close()
