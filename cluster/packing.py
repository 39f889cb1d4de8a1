"""One layer's copies of experts into the slots' seats: how many copies of each, and which slot takes which. Pure.

`resize` uses it to move as little as it can, `rebalance` to go by load. Everything is deterministic: equal choices fall
to the lower expert and the lower slot. Shape legend: E logical experts.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.config_errors import ConfigError

Nodes = Mapping[int, str]  # slot -> the node that it is on


@dataclass(frozen=True)
class Room:
    """Where copies of one layer's experts may go: `each` in every slot, and one more in `extra` of them.

    `nodes` has the node of each slot; where nodes are not known, every slot counts as one.
    """

    nodes: Mapping[int, object]
    replicas: int
    each: int
    extra: int

    @classmethod
    def of(
        cls, num_experts: int, slots: Sequence[int], per_actor: int | None, replicas: int, nodes: Nodes | None
    ) -> Room:
        """The room in `slots` for `replicas` holders, at least, of every expert.

        With `per_actor` each slot has that many seats. Without, there are as many seats as the replicas take, evenly
        split, and no slot is without any.

        Raises:
            ConfigError: the slots cannot take `replicas` different holders of every expert.
        """
        if per_actor is not None and per_actor > num_experts:
            raise ConfigError([f"experts.per_actor ({per_actor}) must be at most the {num_experts} experts of a layer"])
        if replicas > len(slots):
            raise ConfigError(
                [
                    f"experts.actors ({len(slots)}) must be at least experts.replicas ({replicas}): "
                    "the holders of an expert are different actors"
                ]
            )
        needed = num_experts * replicas
        if per_actor is not None and len(slots) * per_actor < needed:
            holders = "" if replicas == 1 else f" with {replicas} holders each"
            raise ConfigError(
                [
                    f"experts.actors ({len(slots)}) must be at least {-(-needed // per_actor)}: with experts.per_actor "
                    f"{per_actor} there are {len(slots) * per_actor} seats for {num_experts} experts{holders}"
                ]
            )
        each, extra = divmod(max(needed, len(slots)), len(slots)) if per_actor is None else (per_actor, 0)
        return cls({slot: slot if nodes is None else nodes[slot] for slot in slots}, replicas, each, extra)

    @property
    def total(self) -> int:
        """Seats in all."""
        return self.each * len(self.nodes) + self.extra

    def seats(self, held: Mapping[int, int], load: Mapping[int, float]) -> dict[int, int]:
        """Slot -> seats: the one more goes to the slots that hold most, then to those with the least load."""
        fullest = sorted(self.nodes, key=lambda slot: (-held[slot], load[slot], slot))
        return {slot: self.each + (slot in fullest[: self.extra]) for slot in self.nodes}


def copy_counts(loads_E: Sequence[float], start_E: Sequence[int], room: Room) -> list[int]:
    """How many copies of each expert fill the seats: from `start_E` on, one more where a copy has the most load.

    >>> copy_counts([60, 20, 10, 10], [1, 1, 1, 1], Room.of(4, range(3), per_actor=2, replicas=1, nodes=None))
    [3, 1, 1, 1]
    """
    counts_E = list(start_E)
    # Among equal loads (none yet, at the start) the expert with fewer copies is first.
    queue = [(-load / count, count, expert) for expert, (load, count) in enumerate(zip(loads_E, counts_E, strict=True))]
    heapq.heapify(queue)
    for _ in range(room.total - sum(counts_E)):
        while queue[0][1] == len(room.nodes):  # every slot has this one
            heapq.heappop(queue)
        _, count, expert = queue[0]
        counts_E[expert] = count + 1
        heapq.heapreplace(queue, (-loads_E[expert] / (count + 1), count + 1, expert))
    return counts_E


class Packing:
    """Copies of one layer's experts on their seats, while they are being put there.

    Args:
        room: the slots and their nodes.
        counts_E: copies of each expert; they fill the seats.
        loads_E: load of each expert, of which its copies get an even share.
        seats: slot -> how many copies it takes; they differ by one at most.
        load: slot -> load so far, layers before this one included, so that one layer evens out another. Added to.
    """

    def __init__(
        self,
        room: Room,
        counts_E: Sequence[int],
        loads_E: Sequence[float],
        seats: Mapping[int, int],
        load: dict[int, float],
    ) -> None:
        self.nodes = room.nodes
        self.replicas = room.replicas
        self.counts_E = counts_E
        self.weight_E = [one / count for one, count in zip(loads_E, counts_E, strict=True)]
        self.seats = seats
        self.load = load
        self.held: dict[int, set[int]] = {slot: set() for slot in seats}

    def heaviest_first(self) -> list[int]:
        """The experts by load per copy."""
        return sorted(range(len(self.weight_E)), key=lambda expert: (-self.weight_E[expert], expert))

    def holders(self, expert: int) -> list[int]:
        return [slot for slot, experts in self.held.items() if expert in experts]

    def put(self, expert: int, slot: int) -> None:
        assert expert not in self.held[slot]
        self.held[slot].add(expert)
        self.load[slot] += self.weight_E[expert]

    def take(self, expert: int, slot: int) -> None:
        self.held[slot].remove(expert)
        self.load[slot] -= self.weight_E[expert]

    def free(self, expert: int) -> list[int]:
        """The slots that could take a copy."""
        return [slot for slot, held in self.held.items() if len(held) < self.seats[slot] and expert not in held]

    def least_loaded(self, slots: Sequence[int]) -> int:
        return min(slots, key=lambda slot: (self.load[slot], slot))

    def place(self, expert: int) -> None:
        """A copy goes to the least loaded slot that can take it; if none can, one makes room by passing a copy on."""
        if slots := self.free(expert):
            self.put(expert, self.least_loaded(slots))
            return
        # Every slot with a free seat has this expert already. A slot without it is full, so it holds one that the slot
        # with the free seat has not: seats differ by one at most.
        last = self.least_loaded([slot for slot in self.seats if len(self.held[slot]) < self.seats[slot]])
        giver = self.least_loaded([slot for slot in self.seats if expert not in self.held[slot]])
        passed = min(self.held[giver] - self.held[last], key=lambda other: (self.weight_E[other], other))
        self.take(passed, giver)
        self.put(passed, last)
        self.put(expert, giver)

    def drop_surplus(self) -> None:
        """Copies beyond `counts_E` go, from the fullest slots."""
        for expert, count in enumerate(self.counts_E):
            while len(holders := self.holders(expert)) > count:
                self.take(expert, max(holders, key=lambda slot: (len(self.held[slot]), self.load[slot], -slot)))

    def level(self) -> None:
        """Slots that hold more than they have seats pass copies on to those that have seats."""
        for full in self.seats:
            while len(self.held[full]) > self.seats[full]:
                room = {slot: self.seats[slot] - len(self.held[slot]) for slot in self.seats}
                target = min(self.seats, key=lambda slot: (-room[slot], self.load[slot], slot))
                expert = self._to_pass(full, target)
                self.take(expert, full)
                self.put(expert, target)

    def _to_pass(self, source: int, target: int) -> int:
        """The expert whose copy, passed on, evens out the two slots' load best and, if that can be, stays on two nodes.

        `target` holds less than `source`, so there is one that it has not.
        """
        gap = (self.load[source] - self.load[target]) / 2

        def cost(expert: int) -> tuple[bool, float, int]:
            after = [target, *(slot for slot in self.holders(expert) if slot != source)]
            return self._on_one_node(after), abs(self.weight_E[expert] - gap), expert

        return min(self.held[source] - self.held[target], key=cost)

    def spread_over_nodes(self) -> None:
        """An expert whose copies are all on one node gets one on another, where no other becomes such an expert.

        It changes places with another expert or, where it cannot, takes the place of a copy beyond the replicas.
        """
        for expert in range(len(self.weight_E)):
            holders = self.holders(expert)
            if not self._on_one_node(holders):
                continue
            if swaps := sorted(self._swaps(expert, holders)):
                _, other, here, there = swaps[0]
                self.take(expert, here)
                self.put(other, here)
            elif spare := sorted(self._spare(self.nodes[holders[0]])):
                _, other, there = spare[0]
            else:
                continue
            self.take(other, there)
            self.put(expert, there)

    def _swaps(self, expert: int, holders: Sequence[int]) -> Iterator[tuple[float, int, int, int]]:
        """(change of load, other expert, slot of `expert`, slot of the other) for each swap that helps."""
        home = self.nodes[holders[0]]
        for there in (slot for slot in self.seats if self.nodes[slot] != home):
            for here in holders:
                for other in self.held[there] - self.held[here]:
                    after = [here, *(slot for slot in self.holders(other) if slot != there)]
                    if not self._on_one_node(after):
                        yield abs(self.weight_E[expert] - self.weight_E[other]), other, here, there

    def _spare(self, home: object) -> Iterator[tuple[float, int, int]]:
        """(load, expert, slot) for each copy that is not on node `home` and could go."""
        for slot in (slot for slot in self.seats if self.nodes[slot] != home):
            for expert in self.held[slot]:
                rest = [other for other in self.holders(expert) if other != slot]
                if len(rest) >= self.replicas and not self._on_one_node(rest):
                    yield self.weight_E[expert], expert, slot

    def _on_one_node(self, slots: Sequence[int]) -> bool:
        return len(slots) > 1 and len({self.nodes[slot] for slot in slots}) == 1
