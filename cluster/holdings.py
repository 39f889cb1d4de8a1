"""What each slot holds, as it changes: who would be missed, one expert moved by hand, what a change costs. Pure.

An `ExpertMap` tells a sender where an expert is. `Holdings` is the same seen from the slots, and knows slots that hold
nothing yet. A copy is one expert of one layer on one slot.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

from dispatch.expert_map import ExpertMap


class Copy(NamedTuple):
    """One expert of one layer on one slot."""

    layer: int
    expert: int
    slot: int


@dataclass(frozen=True)
class Cost:
    """What it takes to get from one `Holdings` to another: copies to load and copies to drop, ascending."""

    loads: tuple[Copy, ...]
    drops: tuple[Copy, ...]


@dataclass(frozen=True)
class Holdings:
    """Which experts of which layers each slot holds: immutable, every expert has a holder, and it travels by pickle.

    Args:
        slots: slot -> layer -> logical experts, each once. A slot may hold nothing; empty layers are left out.

    Raises:
        ValueError: a slot that holds an expert twice, an expert without a holder, layers of unequal numbers of experts,
            or nothing held at all.
    """

    slots: Mapping[int, Mapping[int, tuple[int, ...]]]

    def __post_init__(self) -> None:
        slots = {
            slot: MappingProxyType({layer: tuple(sorted(held[layer])) for layer in sorted(held) if held[layer]})
            for slot, held in sorted(self.slots.items())
        }
        object.__setattr__(self, "slots", MappingProxyType(slots))
        for slot, held in slots.items():
            for layer, experts in held.items():
                if len(set(experts)) < len(experts):
                    raise ValueError(f"slot {slot} holds an expert of layer {layer} twice: {experts}")
        self.to_map(epoch=0)  # the map's own rules: it raises for an expert that nobody holds

    def __reduce__(self) -> tuple[type[Holdings], tuple[dict[int, dict[int, tuple[int, ...]]]]]:
        return Holdings, ({slot: dict(held) for slot, held in self.slots.items()},)

    @classmethod
    def of(cls, expert_map: ExpertMap) -> Holdings:
        """What the slots of `expert_map` hold."""
        return cls({slot: expert_map.experts_of(slot) for slot in expert_map.slot_ids})

    def to_map(self, epoch: int) -> ExpertMap:
        """The same as an expert map. Holders of an expert stand in ascending order."""
        held = {layer: experts for layers in self.slots.values() for layer, experts in layers.items()}
        num_experts = 1 + max((layers[layer][-1] for layers in self.slots.values() for layer in layers), default=-1)
        holders: dict[int, list[list[int]]] = {layer: [[] for _ in range(num_experts)] for layer in held}
        for slot, layers in self.slots.items():
            for layer, experts in layers.items():
                for expert in experts:
                    holders[layer][expert].append(slot)
        return ExpertMap(epoch, {layer: tuple(map(tuple, experts)) for layer, experts in holders.items()})

    @cached_property
    def holders(self) -> Mapping[int, tuple[tuple[int, ...], ...]]:
        """Layer -> for each logical expert, the slots that hold it, ascending."""
        return self.to_map(epoch=0).slots

    @property
    def layers(self) -> tuple[int, ...]:
        """The MoE layers, ascending."""
        return tuple(self.holders)

    @property
    def num_experts(self) -> int:
        """Logical experts per MoE layer."""
        return len(next(iter(self.holders.values())))

    def held(self, slot: int, layer: int) -> tuple[int, ...]:
        """The experts of `layer` on `slot`, ascending; none for a slot that is not known."""
        return self.slots.get(slot, {}).get(layer, ())

    def copies(self) -> frozenset[Copy]:
        """All of them."""
        return frozenset(
            Copy(layer, expert, slot)
            for slot, held in self.slots.items()
            for layer, experts in held.items()
            for expert in experts
        )


def orphans(holdings: Holdings, lost: Collection[int]) -> tuple[tuple[int, int], ...]:
    """The (layer, expert) pairs, ascending, that only slots in `lost` hold.

    >>> orphans(Holdings({0: {1: (0, 1)}, 1: {1: (1, 2)}}), {0})
    ((1, 0),)
    """
    gone = set(lost)
    return tuple(
        (layer, expert)
        for layer, experts in holdings.holders.items()
        for expert, slots in enumerate(experts)
        if gone.issuperset(slots)
    )


def survives(holdings: Holdings, lost: Collection[int]) -> bool:
    """Whether every expert still has a holder when the slots in `lost` are gone."""
    return not orphans(holdings, lost)


def cost(before: Holdings | None, after: Holdings) -> Cost:
    """What has to be loaded and dropped to get from `before` (None: nothing is held yet) to `after`.

    >>> cost(Holdings({0: {1: (0, 1)}}), Holdings({0: {1: (0,)}, 1: {1: (1,)}}))
    Cost(loads=(Copy(layer=1, expert=1, slot=1),), drops=(Copy(layer=1, expert=1, slot=0),))
    """
    had = frozenset() if before is None else before.copies()
    return Cost(loads=tuple(sorted(after.copies() - had)), drops=tuple(sorted(had - after.copies())))


def move(
    holdings: Holdings, expert: int, to_slot: int, layer: int | None = None, from_slot: int | None = None
) -> Holdings:
    """One copy of `expert` goes to `to_slot`: in `layer`, or in every layer (None) where it is not there already.

    It leaves `from_slot`, or (None) the fullest of its holders in that layer, the lowest slot among equals.

    >>> move(Holdings({0: {1: (0, 1)}, 1: {1: (2,)}}), expert=1, to_slot=1).slots[1][1]
    (1, 2)

    Raises:
        ValueError: an unknown slot, expert or layer; `to_slot` has the expert already; `from_slot` does not hold it.
    """
    for slot in (to_slot,) if from_slot is None else (to_slot, from_slot):
        if slot not in holdings.slots:
            raise ValueError(f"there is no slot {slot}; the slots are {_list(holdings.slots)}")
    if layer is not None and layer not in holdings.holders:
        raise ValueError(f"layer {layer} has no experts; the layers with experts are {_list(holdings.layers)}")
    if not 0 <= expert < holdings.num_experts:
        raise ValueError(f"there is no expert {expert}; the experts are 0 to {holdings.num_experts - 1}")
    layers = holdings.layers if layer is None else (layer,)
    place = f"layers {_list(layers)}" if layer is None else f"layer {layer}"
    missing = [at for at in layers if to_slot not in holdings.holders[at][expert]]
    if not missing:
        raise ValueError(f"slot {to_slot} already holds expert {expert} of {place}")
    slots = {slot: dict(held) for slot, held in holdings.slots.items()}
    moved = False
    for at in missing:
        holders = holdings.holders[at][expert]
        source = max(holders, key=lambda slot: (len(slots[slot][at]), -slot)) if from_slot is None else from_slot
        if source in holders:
            slots[source][at] = tuple(held for held in slots[source][at] if held != expert)
            slots[to_slot][at] = (*slots[to_slot].get(at, ()), expert)
            moved = True
    if not moved:
        raise ValueError(f"slot {from_slot} holds no expert {expert} of {place} that slot {to_slot} has not")
    return Holdings(slots)


def _list(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
