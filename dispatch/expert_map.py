"""Which expert lives where: immutable, with an epoch number. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class ExpertMap:
    """Per MoE layer, the slots that hold each logical expert.

    A slot is the seat of one expert actor. Slot ids never renumber when a member dies, so they may have gaps; two maps
    are compared by their epochs.

    Args:
        epoch: number of this map; a later one replaces it.
        slots: layer -> for each logical expert, in order, the slots that hold it (more than one: replicas).

    Raises:
        ValueError: a negative epoch or slot, no layers, layers of unequal numbers of experts, an expert that no slot
            holds or that one slot holds twice.
    """

    epoch: int
    slots: Mapping[int, tuple[tuple[int, ...], ...]]

    def __post_init__(self) -> None:
        layers = {layer: tuple(tuple(holders) for holders in self.slots[layer]) for layer in sorted(self.slots)}
        object.__setattr__(self, "slots", MappingProxyType(layers))
        if self.epoch < 0:
            raise ValueError(f"epoch must not be negative, got {self.epoch}")
        if not layers:
            raise ValueError("slots must name at least one layer")
        for layer, experts in layers.items():
            if not experts or len(experts) != self.num_experts:
                raise ValueError(f"slots[{layer}] has {len(experts)} experts, the first layer has {self.num_experts}")
            for expert, holders in enumerate(experts):
                if not holders:
                    raise ValueError(f"slots[{layer}][{expert}]: no slot holds this expert")
                if len(set(holders)) != len(holders) or min(holders) < 0:
                    raise ValueError(f"slots[{layer}][{expert}] must be different slots from 0 on, got {holders}")

    def __reduce__(self) -> tuple[type["ExpertMap"], tuple[int, dict[int, tuple[tuple[int, ...], ...]]]]:
        return ExpertMap, (self.epoch, dict(self.slots))

    @property
    def layers(self) -> tuple[int, ...]:
        """The MoE layers, ascending."""
        return tuple(self.slots)

    @property
    def num_experts(self) -> int:
        """Logical experts per MoE layer."""
        return len(next(iter(self.slots.values())))

    @property
    def slot_ids(self) -> tuple[int, ...]:
        """Every slot that holds anything, ascending."""
        return tuple(sorted({slot for experts in self.slots.values() for holders in experts for slot in holders}))

    def holders(self, layer: int, expert: int) -> tuple[int, ...]:
        """The slots that hold `expert` of `layer`."""
        return self.slots[layer][expert]

    def experts_of(self, slot: int) -> dict[int, tuple[int, ...]]:
        """Layer -> logical experts, ascending, that `slot` holds. Layers of which it holds none are left out."""
        held = {
            layer: tuple(expert for expert, holders in enumerate(experts) if slot in holders)
            for layer, experts in self.slots.items()
        }
        return {layer: experts for layer, experts in held.items() if experts}
