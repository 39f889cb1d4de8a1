"""Where the members of an epoch meet: a store in a process of its own.

It holds no data rank and no logic, so that neither a member's death nor the controller's takes the meeting place away.
"""

from __future__ import annotations

import ray


@ray.remote(num_cpus=0)
class Rendezvous:
    def __init__(self) -> None:
        from dispatch.store import host_store  # with torch, which whoever starts this does without

        self._host = ray.util.get_node_ip_address()
        self._store, self._port = host_store(self._host)

    def address(self) -> tuple[str, int]:
        """Host and port that members connect to."""
        return self._host, self._port

    def __repr__(self) -> str:
        return f"rendezvous({self._host}:{self._port})"
