"""Who serves which experts, and where to reach them: what an attention actor of the p2p transport follows.

Imports no torch. A topology is immutable; a later one, told by its map's epoch, replaces it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from dispatch.expert_map import ExpertMap


@dataclass(frozen=True, slots=True)
class SlotAddress:
    """Where one life of a slot's expert server listens.

    Attributes:
        incarnation: random name of this life; a server that comes back at the same slot has another.
        host, port: TCP, on the node's cluster address.
        unix_path: Unix socket, of use only where this path exists; None if it has none.
    """

    incarnation: str
    host: str
    port: int
    unix_path: str | None


@dataclass(frozen=True)
class Topology:
    """An expert map and the servers that stand behind it.

    Args:
        expert_map: who holds which experts.
        addresses: the slots that are alive and serving. A slot of the map without an address cannot be reached now, and
            an expert that only such slots hold has to be waited for.
        secret: what every member of the cluster proves to know; never shown.

    Raises:
        ValueError: an empty secret.
    """

    expert_map: ExpertMap
    addresses: Mapping[int, SlotAddress]
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "addresses", MappingProxyType(dict(self.addresses)))
        if not self.secret:
            raise ValueError("a topology needs the cluster's secret, got an empty one")

    def __reduce__(self) -> tuple[type["Topology"], tuple[ExpertMap, dict[int, SlotAddress], bytes]]:
        return Topology, (self.expert_map, dict(self.addresses), self.secret)

    @property
    def epoch(self) -> int:
        """The map's epoch."""
        return self.expert_map.epoch
