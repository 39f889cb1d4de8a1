"""Which hardware a deployment needs, and where its actors go: on a machine alone, or as a configuration says. Pure.

An attention actor has a whole copy of everything but the routed experts, and the KV of its own sequences; an expert
actor has its experts of every MoE layer. None is cut over devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from cluster.config import DeploymentConfig, Strategy
from cluster.kv_pools import pool_pages
from cluster.machines import Machine
from cluster.model_shape import ModelShape, Moe, Precision, weight_bytes
from cluster.placement import assign_experts, bundles
from cluster.plan_units import size
from cluster.roofline import Split, StepTime, decode_step

RESERVE = 0.1  # of a device's memory: rows in flight, the runtime's own, fragmentation


class Misfit(Exception):
    """Why something does not fit, in one sentence."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What is planned for: so many sequences at once, each of `context` tokens, by `shape` on `machine`."""

    shape: ModelShape
    machine: Machine
    precision: Precision
    context: int
    batch: int

    @property
    def usable(self) -> int:
        """Bytes of a device that weights and KV may take."""
        return int(self.machine.memory * (1 - RESERVE))

    @property
    def sequence_bytes(self) -> int:
        """KV of one sequence."""
        return self.shape.kv_bytes(self.context, self.precision)

    @property
    def attention_weights(self) -> int:
        """Bytes of weights on each attention actor."""
        return weight_bytes(self.shape.beside_experts, self.precision)

    def expert_weights(self, experts: int) -> int:
        """Bytes of that many experts of every MoE layer."""
        layers = self.shape.moe.layers if self.shape.moe else 0
        return weight_bytes(experts * layers * self.shape.expert_parameters, self.precision)

    @property
    def sequences_per_device(self) -> int:
        """Sequences whose KV fits beside the weights of an attention actor that has a device of its own."""
        return max(0, (self.usable - self.attention_weights) // self.sequence_bytes)

    def step(self, split: Split) -> StepTime:
        """The roofline of a decoding step for all sequences."""
        return decode_step(self.shape, self.machine, self.precision, self.context, self.batch, split)

    @property
    def devices_by_memory(self) -> int:
        """Devices that hold all weights, the image encoder's too, and the KV of all sequences, if cut at will."""
        kv = self.batch * self.sequence_bytes
        return -(-(weight_bytes(self.shape.total, self.precision) + kv) // self.usable)


def least_devices(work: Workload) -> tuple[int, int]:
    """(attention, expert) devices that are enough for one actor each. Raises Misfit where no number is."""
    if work.sequences_per_device == 0:
        raise Misfit(
            f"an attention actor would need {size(work.attention_weights)} for weights and {size(work.sequence_bytes)} "
            f"for the KV of one sequence of {work.context:,} tokens, and its device has {size(work.usable)} for them; "
            "neither is cut over devices"
        )
    attention = -(-work.batch // work.sequences_per_device)
    moe = work.shape.moe
    if moe is None:
        return attention, 0
    each = min(moe.experts, work.usable // work.expert_weights(1))
    if each == 0:
        raise Misfit(
            f"one expert of all {moe.layers} MoE layers would take {size(work.expert_weights(1))}, and a device has "
            f"{size(work.usable)} for it"
        )
    return attention, -(-moe.experts // each)


def best_split(work: Workload, devices: int | None = None, nodes: int | None = None) -> Split:
    """How many devices each role gets: of `devices` the split that decodes fastest, else as few as there must be.

    Raises Misfit if `devices` are too few, or if no number is enough.
    """
    attention, experts = least_devices(work)
    total = devices or attention + experts
    if total < attention + experts:
        roles = f"{attention} for attention" + (f" and {experts} for experts" if experts else "")
        raise Misfit(f"{total} devices are too few: {roles} are the least")
    nodes = max(-(-total // work.machine.devices_per_node), min(nodes or 0, total))
    most = total - attention if experts else 0
    splits = [Split(total - number, _held(work.shape.moe, number), total, nodes) for number in range(experts, most + 1)]
    return min(splits, key=lambda split: work.step(split).seconds)


def _held(moe: Moe | None, actors: int) -> tuple[int, ...]:
    assigned = assign_experts(moe.experts, range(actors), None) if moe else {}
    return tuple(len(experts) for experts in assigned.values())


@dataclass(frozen=True, slots=True)
class Actors:
    """The actors of a deployment.

    `attention_kv`: bytes of KV on each attention actor. `sequences`: how many of the workload's context can run at
    once. `on_nodes`: for each node, the ranks of its attention actors and its expert slots.
    """

    split: Split
    attention_kv: int
    sequences: int
    on_nodes: tuple[tuple[tuple[int, ...], ...], ...]


def actors_of_split(work: Workload, split: Split) -> Actors:
    """One actor for each device, both roles spread over all nodes."""
    return Actors(
        split,
        attention_kv=-(-work.batch // split.attention) * work.sequence_bytes,
        sequences=split.attention * work.sequences_per_device,
        on_nodes=over_nodes(
            [(split.attention, "SPREAD"), (len(split.held), "SPREAD")], work.machine.devices_per_node, split.nodes
        ),
    )


def actors_of_config(work: Workload, config: DeploymentConfig, nodes: int | None = None) -> Actors:
    """The actors that `herder serve` starts; those on CPUs share a machine.

    Raises ConfigError as the placement does, Misfit where a node cannot take what has to be together.
    """
    shape, engine, experts = work.shape, config.engine, config.experts
    if shape.moe is None:
        raise Misfit(f"{shape.name} has no routed experts: there is nothing for expert actors to hold")
    assigned = assign_experts(shape.moe.experts, range(experts.actors), experts.per_actor, experts.replicas)
    groups = bundles(config)
    roles = [(len(groups[role].bundles), groups[role].strategy) for role in ("attention", "experts")]
    actors = sum(number for number, _ in roles)
    on_gpus = config.attention.device == "cuda"
    on_nodes = over_nodes(roles, work.machine.devices_per_node if on_gpus else actors, nodes or 1)
    full, chunked = pool_pages(engine, shape.chunk)
    pages = (shape.layers - shape.chunked_layers) * full + shape.chunked_layers * chunked
    per_actor = min(engine.max_running, full // -(-work.context // engine.page_size))
    return Actors(
        Split(
            attention=config.attention.actors,
            held=tuple(len(held) for held in assigned.values()),
            devices=actors if on_gpus else len(on_nodes) * work.machine.devices_per_node,
            nodes=len(on_nodes),
        ),
        attention_kv=pages * engine.page_size * shape.kv_token_bytes(work.precision),
        sequences=config.attention.actors * per_actor,
        on_nodes=on_nodes,
    )


def over_nodes(
    roles: Sequence[tuple[int, Strategy]], per_node: int, least: int
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """For each node, the actors of each role that Ray's strategies ask to be there, on as few nodes as that takes.

    `roles` has each role's number of actors and its strategy, `per_node` the places of a node.

    >>> over_nodes([(2, "SPREAD"), (2, "STRICT_PACK")], per_node=3, least=2)
    (((1,), (0, 1)), ((0,), ()))

    Raises Misfit if a STRICT_PACK role is larger than a node.
    """
    for actors, strategy in roles:
        if strategy == "STRICT_PACK" and actors > per_node:
            raise Misfit(f"{actors} actors with the strategy STRICT_PACK do not fit a node of {per_node} devices")
    actors = sum(number for number, _ in roles)
    for nodes in count(max(least, -(-actors // per_node))):
        placed = _place(roles, per_node, nodes)
        if placed is not None:
            return tuple(tuple(tuple(on_role) for on_role in node) for node in placed)
    raise AssertionError("a node for each actor is always enough")


def _place(roles: Sequence[tuple[int, Strategy]], per_node: int, nodes: int) -> list[list[list[int]]] | None:
    """[node][role] -> actors, or None where they do not fit. What has to be together is placed first."""
    placed: list[list[list[int]]] = [[[] for _ in roles] for _ in range(nodes)]
    room = [per_node] * nodes
    for role in sorted(range(len(roles)), key=lambda role: roles[role][1] != "STRICT_PACK"):
        actors, strategy = roles[role]
        needed = actors if strategy == "STRICT_PACK" else 1
        home: int | None = None
        for actor in range(actors):
            free = [node for node in range(nodes) if room[node] >= needed]
            if strategy == "STRICT_PACK" and home is not None:
                free = [home]
            if strategy == "STRICT_SPREAD":
                free = [node for node in free if not placed[node][role]]
            if not free:
                return None
            spread = strategy.endswith("SPREAD")
            home = min(free, key=lambda node: (len(placed[node][role]), -room[node], node) if spread else (node,))
            placed[home][role].append(actor)
            room[home] -= 1
    return placed
