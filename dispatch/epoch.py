"""An epoch of the collective transport as all speak of it: who takes part, where they meet, how it ends.

Imports no torch: the controller, which only hands it on, has none.
"""

from dataclasses import dataclass

from dispatch.expert_map import ExpertMap


class GroupBroken(RuntimeError):
    """The epoch's group is of no use any more: a member died, went silent or broke the protocol. Close it."""

    def __init__(self, epoch: int, doing: str, reason: object) -> None:
        super().__init__(f"epoch {epoch}: group broken while {doing}: {reason}")
        self.epoch = epoch
        self.doing = doing
        self.reason = str(reason)

    def __reduce__(self) -> tuple[type["GroupBroken"], tuple[int, str, str]]:
        return type(self), (self.epoch, self.doing, self.reason)


class StaleEpoch(GroupBroken):
    """A member speaks for another epoch or another step; the message has both numbers."""


@dataclass(frozen=True)
class World:
    """Who takes part: ids of attention members and ids of expert slots. Either may have gaps.

    Raises:
        ValueError: no attention member, no slot, or one named twice.
    """

    attention: tuple[int, ...]
    slots: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, ids in (("attention", self.attention), ("slots", self.slots)):
            if not ids or len(set(ids)) != len(ids):
                raise ValueError(f"{name} must be one or more different ids, got {ids}")

    @property
    def size(self) -> int:
        return len(self.attention) + len(self.slots)

    def attention_rank(self, member: int) -> int:
        """Rank of an attention member."""
        return self.attention.index(member)

    def slot_rank(self, slot: int) -> int:
        """Rank of a slot."""
        return len(self.attention) + self.slots.index(slot)

    def name(self, rank: int) -> str:
        """What a rank is, for messages: "attention 0", "slot 3"."""
        first_slot = len(self.attention)
        return f"attention {self.attention[rank]}" if rank < first_slot else f"slot {self.slots[rank - first_slot]}"


@dataclass(frozen=True, slots=True)
class Epoch:
    """What a member must know to join: where the experts are, who takes part, and where the members meet."""

    expert_map: ExpertMap
    world: World
    store_host: str
    store_port: int
