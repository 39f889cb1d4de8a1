"""Where experts and actors go. Pure: numbers in, numbers out.

A slot is the place of one expert actor; slots are numbered from 0 and keep their numbers. In the first plan a slot
holds the same experts in every MoE layer; what is changed later goes layer by layer. Shape legend: E logical experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.config import DeploymentConfig, RoleConfig, Strategy
from cluster.holdings import Holdings
from cluster.packing import Nodes, Packing, Room, copy_counts
from dispatch.expert_map import ExpertMap

Loads = Mapping[int, Sequence[float]]  # layer -> for each logical expert, its share of the tokens, in any unit


def assign_experts(
    num_experts: int, slots: Sequence[int], per_actor: int | None, replicas: int = 1, nodes: Nodes | None = None
) -> dict[int, tuple[int, ...]]:
    """Which logical experts each slot holds.

    Seats are numbered through, slot after slot, and filled with the experts round and round. Without `per_actor` there
    are `replicas` seats for each expert, evenly split; where that does not divide, the first slots take one more:

    >>> assign_experts(16, range(3), None)
    {0: (0, 1, 2, 3, 4, 5), 1: (6, 7, 8, 9, 10), 2: (11, 12, 13, 14, 15)}
    >>> assign_experts(4, range(3), None, replicas=2)
    {0: (0, 1, 2), 1: (0, 1, 3), 2: (2, 3)}

    With it, every slot has that many; seats beyond `replicas` of each expert hold further ones:

    >>> assign_experts(4, range(3), 2)
    {0: (0, 1), 1: (2, 3), 2: (0, 1)}
    >>> assign_experts(4, range(2), 3)
    {0: (0, 1, 2), 1: (0, 1, 3)}

    More slots than experts have one seat each:

    >>> assign_experts(2, range(3), None)
    {0: (0,), 1: (1,), 2: (0,)}

    No slot holds an expert twice. With `nodes`, slots of one node follow each other, the largest node first: so copies
    of an expert are on different nodes, and it survives the loss of any node if the others have enough seats:

    >>> assign_experts(4, range(4), None, replicas=2, nodes={0: "a", 1: "b", 2: "a", 3: "b"})
    {0: (0, 1), 1: (0, 1), 2: (2, 3), 3: (2, 3)}

    Raises ConfigError naming experts.per_actor or experts.actors when the seats do not fit the experts.
    """
    assert num_experts >= 1 and slots
    room = Room.of(num_experts, slots, per_actor, replicas, nodes)
    by_node: dict[object, list[int]] = {}
    for slot in slots:
        by_node.setdefault(room.nodes[slot], []).append(slot)
    in_order = [slot for group in sorted(by_node.values(), key=len, reverse=True) for slot in group]
    assignment: dict[int, tuple[int, ...]] = {}
    start = 0
    for number, slot in enumerate(in_order):
        end = start + room.each + (number < room.extra)
        assignment[slot] = tuple(sorted(seat % num_experts for seat in range(start, end)))
        start = end
    return {slot: assignment[slot] for slot in slots}


def plan_experts(
    config: DeploymentConfig, num_experts: int, moe_layers: Sequence[int], nodes: Nodes | None = None
) -> ExpertMap:
    """The first expert map (epoch 0) for a checkpoint that has `num_experts` experts in each of `moe_layers`."""
    experts = config.experts
    assignment = assign_experts(num_experts, range(experts.actors), experts.per_actor, experts.replicas, nodes)
    return Holdings({slot: dict.fromkeys(moe_layers, held) for slot, held in assignment.items()}).to_map(epoch=0)


def resize(
    holdings: Holdings,
    slots: Sequence[int],
    seats: int | None,
    replicas: int,
    nodes: Nodes | None = None,
    loads: Loads | None = None,
) -> Holdings:
    """The experts on exactly these slots, with as few copies loaded as that takes.

    What slots that stay hold, they keep, but for copies that have to go for evenness: the numbers of experts that two
    slots hold in a layer differ by one at most. A slot may be new, and a slot of `holdings` may be gone for good.

    >>> before = Holdings({0: {1: (0, 1, 2)}, 1: {1: (3, 4, 5)}})
    >>> resize(before, (0, 1, 2), seats=None, replicas=1).holders
    mappingproxy({1: ((2,), (0,), (0,), (2,), (1,), (1,))})

    Args:
        seats: copies that each slot takes per layer; None: `replicas` of each expert, evenly split.
        replicas: holders, at least, of every expert.
        nodes: node of each of `slots`; copies of an expert are put on different nodes where nodes allow it.
        loads: decide which experts get the seats beyond `replicas`, and which slots take what has to be moved.

    Raises:
        ConfigError: as `assign_experts`.
    """
    room = Room.of(holdings.num_experts, slots, seats, replicas, nodes)
    load = dict.fromkeys(slots, 0.0)
    layers = {}
    for layer, holders_E in holdings.holders.items():
        loads_E = [1.0] * holdings.num_experts if loads is None else loads[layer]
        kept_E = [[slot for slot in slots if slot in holders] for holders in holders_E]
        layers[layer] = _refill(kept_E, loads_E, room, load)
    return Holdings({slot: {layer: tuple(held[slot]) for layer, held in layers.items()} for slot in slots})


def without(
    holdings: Holdings,
    slot: int,
    seats: int | None,
    replicas: int,
    nodes: Nodes | None = None,
    loads: Loads | None = None,
) -> Holdings:
    """The experts of `slot` on the other slots, and `slot` gone. Arguments and errors as `resize`.

    Raises:
        ValueError: there is no such slot.
    """
    if slot not in holdings.slots:
        raise ValueError(f"there is no slot {slot}; the slots are {', '.join(map(str, holdings.slots))}")
    return resize(holdings, [other for other in holdings.slots if other != slot], seats, replicas, nodes, loads)


def _refill(
    kept_E: Sequence[Sequence[int]], loads_E: Sequence[float], room: Room, load: dict[int, float]
) -> Mapping[int, set[int]]:
    """One layer of `resize`: slot -> experts. `kept_E` has the slots that stay and hold each expert; adds to `load`."""
    counts_E = _lowered([max(len(kept), room.replicas) for kept in kept_E], loads_E, room)
    counts_E = copy_counts(loads_E, counts_E, room)
    held = {slot: sum(slot in kept for kept in kept_E) for slot in load}
    packing = Packing(room, counts_E, loads_E, room.seats(held, load), load)
    for expert, kept in enumerate(kept_E):
        for slot in kept:
            packing.put(expert, slot)
    packing.drop_surplus()
    packing.level()
    for expert in packing.heaviest_first():
        for _ in range(counts_E[expert] - len(packing.holders(expert))):
            packing.place(expert)
    packing.spread_over_nodes()
    return packing.held


def _lowered(counts_E: list[int], loads_E: Sequence[float], room: Room) -> list[int]:
    """Takes copies beyond the replicas away until the rest has seats, where the load per copy stays least."""
    while sum(counts_E) > room.total:
        spare = [expert for expert, count in enumerate(counts_E) if count > room.replicas]
        least = min(spare, key=lambda expert: (loads_E[expert] / (counts_E[expert] - 1), -counts_E[expert], -expert))
        counts_E[least] -= 1
    return counts_E


@dataclass(frozen=True, slots=True)
class RoleBundles:
    """A Ray placement group to ask for: one bundle for each actor of a role, in rank or slot order."""

    bundles: tuple[dict[str, float], ...]
    strategy: Strategy


def bundles(config: DeploymentConfig) -> dict[str, RoleBundles]:
    """The placement groups of a deployment, by role: "attention" and "experts"."""
    return {"attention": _group(config.attention), "experts": _group(config.experts)}


def _group(role: RoleConfig) -> RoleBundles:
    wanted = {"CPU": role.num_cpus, "GPU": role.num_gpus, **role.resources}
    bundle = {name: amount for name, amount in wanted.items() if amount > 0}
    return RoleBundles(tuple(dict(bundle) for _ in range(role.actors)), role.strategy)
