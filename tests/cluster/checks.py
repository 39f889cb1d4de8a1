"""What must hold of all holdings, however they came about, and the plan that tests begin with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.holdings import Holdings, orphans
from cluster.placement import assign_experts


def table(num_experts: int, slots: Sequence[int], per_actor: int | None, replicas: int, layers: int = 2) -> Holdings:
    """The first plan, as holdings."""
    assignment = assign_experts(num_experts, slots, per_actor, replicas)
    return Holdings({slot: dict.fromkeys(range(layers), held) for slot, held in assignment.items()})


def check_seats(holdings: Holdings, slots: Sequence[int], seats: int | None, replicas: int) -> None:
    """Exactly these slots, as many holders as asked for, seats that differ by one at most or are all taken."""
    assert set(holdings.slots) == set(slots)
    for layer, holders_E in holdings.holders.items():
        assert min(map(len, holders_E)) >= replicas
        sizes = [len(holdings.held(slot, layer)) for slot in slots]
        assert max(sizes) - min(sizes) <= 1
        assert sum(sizes) == (max(len(holders_E) * replicas, len(slots)) if seats is None else seats * len(slots))


def check_nodes(holdings: Holdings, nodes: Mapping[int, str]) -> None:
    """A node can be lost wherever the others have as many seats as there are experts."""
    for node in set(nodes.values()):
        gone = orphans(holdings, {slot for slot in nodes if nodes[slot] == node})
        for layer in holdings.layers:
            seats = sum(len(holdings.held(slot, layer)) for slot in nodes if nodes[slot] != node)
            assert seats < holdings.num_experts or layer not in {layer for layer, _ in gone}
