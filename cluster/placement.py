"""Where experts and actors go. Pure: numbers in, numbers out.

A slot is the place of one expert actor; slots are numbered from 0 and keep their numbers. In the plan made here a slot
holds the same experts in every MoE layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.config import ConfigError, DeploymentConfig, RoleConfig, Strategy
from dispatch.expert_map import ExpertMap


def assign_experts(num_experts: int, slots: Sequence[int], per_actor: int | None) -> dict[int, tuple[int, ...]]:
    """Which logical experts each slot holds.

    Without `per_actor`, experts are split evenly and consecutively; where that does not divide, the first slots take
    one more:

    >>> assign_experts(16, range(3), None)
    {0: (0, 1, 2, 3, 4, 5), 1: (6, 7, 8, 9, 10), 2: (11, 12, 13, 14, 15)}

    With it, every slot has that many seats, filled round and round; seats beyond the experts become replicas, and no
    slot holds an expert twice:

    >>> assign_experts(4, range(3), 2)
    {0: (0, 1), 1: (2, 3), 2: (0, 1)}
    >>> assign_experts(4, range(2), 3)
    {0: (0, 1, 2), 1: (3, 0, 1)}

    More slots than experts work the same way, with one seat each:

    >>> assign_experts(2, range(3), None)
    {0: (0,), 1: (1,), 2: (0,)}

    Raises ConfigError naming experts.per_actor or experts.actors when the seats do not fit the experts.
    """
    assert num_experts >= 1 and slots
    if per_actor is None and len(slots) < num_experts:
        size, more = divmod(num_experts, len(slots))
        starts = [i * size + min(i, more) for i in range(len(slots) + 1)]
        return {slot: tuple(range(starts[i], starts[i + 1])) for i, slot in enumerate(slots)}
    seats = per_actor or 1
    if seats > num_experts:
        raise ConfigError([f"experts.per_actor ({seats}) must be at most the {num_experts} experts of a layer"])
    if len(slots) * seats < num_experts:
        needed = -(-num_experts // seats)
        raise ConfigError(
            [
                f"experts.actors ({len(slots)}) must be at least {needed}: with experts.per_actor {seats}, "
                f"{len(slots) * seats} of {num_experts} experts would have a place"
            ]
        )
    return {slot: tuple((i * seats + j) % num_experts for j in range(seats)) for i, slot in enumerate(slots)}


def plan_experts(config: DeploymentConfig, num_experts: int, moe_layers: Sequence[int]) -> ExpertMap:
    """The first expert map (epoch 0) for a checkpoint that has `num_experts` experts in each of `moe_layers`."""
    assignment = assign_experts(num_experts, range(config.experts.actors), config.experts.per_actor)
    holders = tuple(tuple(slot for slot, held in assignment.items() if expert in held) for expert in range(num_experts))
    return ExpertMap(epoch=0, slots={layer: holders for layer in moe_layers})


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
