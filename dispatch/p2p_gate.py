"""The step gate of an attention rank on the p2p transport: steps when it has rows itself, and takes up topologies.

Nobody is asked whether there is a step. A topology may come at any time from any thread: connections to its servers are
made beside the engine, because a server whose process stands still accepts them and then never answers, and begin()
installs what is ready, between two steps.
"""

import logging
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch

from dispatch.connections import Connection, HandshakeFailed, Hello, RowFormat, connect
from dispatch.epoch import GroupBroken
from dispatch.gate import StepAnswer
from dispatch.lanes import CLIENT, Lane, LaneBroken
from dispatch.p2p import P2PDispatcher
from dispatch.topology import SlotAddress, Topology

_log = logging.getLogger(__name__)
_CONNECTING_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class _Ready:
    topology: Topology
    connections: Sequence[Connection]
    installed: "Future[None]" = field(repr=False)


class P2PGate:
    """begin(), wait() and recover() belong to the engine's thread; adopt(), ring() and close() to any.

    Args:
        dispatcher: of the same engine.
        width, dtype: of the rows that it will send.
        connect_timeout_s: for one connection, its handshake included.
        lanes_on: rows lie on this device and travel by lanes; None: on the CPU, by the sockets.
    """

    def __init__(
        self,
        dispatcher: P2PDispatcher,
        width: int,
        dtype: torch.dtype,
        connect_timeout_s: float = 2.0,
        lanes_on: torch.device | None = None,
    ) -> None:
        self._dispatcher = dispatcher
        self._hello = Hello(dispatcher.source, RowFormat(width, dtype, lanes_on))
        self._connect_timeout_s = connect_timeout_s
        self._rung = threading.Event()
        self._lock = threading.Lock()
        self._ready: list[_Ready] = []
        self._closed = False

    def adopt(self, topology: Topology) -> "Future[None]":
        """Take up a topology at the next begin(); the future is done when it is installed, or is older than what is.

        Slots that cannot be reached in time are left out, and tried again by the next adopt(), which may be of the same
        topology.
        """
        installed: Future[None] = Future()
        name = f"adopt-{topology.epoch}"
        threading.Thread(target=self._prepare, args=(topology, installed), name=name, daemon=True).start()
        return installed

    def begin(self, rows: int, leaving: bool) -> StepAnswer:
        """Install what is ready; whether there is a step."""
        renewed = self._install()
        if renewed:
            self._rung.set()  # what waited for it is to be scheduled: an idle engine comes round once more
        if rows and not leaving:
            self._dispatcher.begin_step()
        return StepAnswer(idle=rows == 0 and not leaving, leaving=leaving, renewed=renewed)

    def wait(self) -> None:
        """Block, without CPU, until ring()."""
        self._rung.wait()
        self._rung.clear()

    def ring(self) -> None:
        """There is work, or a wish to leave."""
        self._rung.set()

    def recover(self, error: GroupBroken) -> None:
        """There is no group that could be formed again: raises `error`."""
        raise error

    def close(self) -> None:
        """Close what has been connected but not installed; adopts nothing any more. The dispatcher closes the rest."""
        with self._lock:
            self._closed = True
            ready, self._ready = self._ready, []
        for late in ready:
            _close(late.connections)
            late.installed.cancel()

    def _install(self) -> bool:
        """Install all topologies that are ready and not older than what is installed; whether there was one."""
        if not self._ready:
            return False
        with self._lock:
            ready, self._ready = self._ready, []
        any_installed = False
        for item in sorted(ready, key=lambda item: item.topology.epoch):
            if self._is_old(item.topology):
                _close(item.connections)
            else:
                self._dispatcher.install(item.topology, item.connections)
                any_installed = True
            item.installed.set_result(None)
        return any_installed

    def _is_old(self, topology: Topology) -> bool:
        epoch = self._dispatcher.epoch
        return epoch is not None and topology.epoch < epoch

    # ---- on a thread of each adopt()

    def _prepare(self, topology: Topology, installed: "Future[None]") -> None:
        connected = self._dispatcher.connected
        wanted = [
            (slot, address)
            for slot, address in topology.addresses.items()
            if connected.get(slot) != address.incarnation and not self._is_old(topology)
        ]
        connections: list[Connection] = []
        if wanted:
            with ThreadPoolExecutor(min(len(wanted), _CONNECTING_AT_ONCE)) as pool:
                found = pool.map(lambda wish: self._connect(wish[0], wish[1], topology.secret), wanted)
                connections = [connection for connection in found if connection is not None]
        with self._lock:
            closed = self._closed
            if not closed:
                self._ready.append(_Ready(topology, connections, installed))
        if closed:
            _close(connections)
            installed.cancel()
        self.ring()

    def _connect(self, slot: int, address: SlotAddress, secret: bytes) -> Connection | None:
        try:
            connection = connect(slot, address, self._hello, secret, self._connect_timeout_s)
            return connection if self._hello.rows.lanes_on is None else self._with_lane(connection, address)
        except (OSError, HandshakeFailed, LaneBroken) as error:
            _log.warning("attention %d cannot reach slot %d: %s", self._hello.source, slot, error)
            return None

    def _with_lane(self, connection: Connection, address: SlotAddress) -> Connection:
        device = self._hello.rows.lanes_on
        assert device is not None
        over_tcp = connection.socket.family != socket.AF_UNIX
        own_address = connection.socket.getsockname()[0] if over_tcp else address.host
        try:
            lane = Lane.form(connection.socket, CLIENT, device, own_address)
        except BaseException:
            connection.close()
            raise
        return replace(connection, lane=lane)


def _close(connections: Sequence[Connection]) -> None:
    for connection in connections:
        connection.close()
