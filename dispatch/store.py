"""Where the members of an epoch meet: one TCPStore, in a process that is no member.

Each new connection makes the client *and* the server look up the other's name in the DNS (torch 2.13), and the server
serves nobody until that is answered or, after 5 s by default, given up. So connections are made once per process, not
once per epoch.
"""

from dataclasses import dataclass
from datetime import timedelta

from torch._C._distributed_c10d import Store, TCPStore


@dataclass(frozen=True, eq=False)
class StoreClients:
    """One process's connections to the store: a client is locked while it waits, so each use has its own.

    Attributes:
        meeting: for forming groups, and for whatever else the loop's thread asks.
        waiting: for an idle member, which may wait for hours.
        ringing: for other threads, to end that waiting.
    """

    meeting: Store
    waiting: Store
    ringing: Store


def host_store(address: str) -> tuple[Store, int]:
    """Opens a store on a free port of `address`; it lives as long as what is returned. Gives the port as well."""
    store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
    return store, store.port


def connect_store(address: str, port: int, timeout_s: float) -> StoreClients:
    """Clients of that store, to be kept from epoch to epoch.

    Raises:
        RuntimeError: it cannot be reached within `timeout_s`.
    """
    meeting, waiting, ringing = (
        TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_s)) for _ in range(3)
    )
    return StoreClients(meeting, waiting, ringing)
