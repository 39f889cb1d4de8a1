"""What a plan says, as data: the JSON of `herder plan --json`. Fields may be added; `version` tells of other changes.

Sizes are bytes, times seconds, shares fractions of 1.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from cluster.model_shape import Precision
from cluster.roofline import Limit


class _Report(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PartReport(_Report):
    """Parameters of one kind, and their size at each precision."""

    name: str
    parameters: int
    bytes: dict[Precision, int]


class ParametersReport(_Report):
    """`active`: those that a text token goes through; `active_share`: of all."""

    total: int
    active: int
    active_share: float
    parts: tuple[PartReport, ...]
    total_bytes: dict[Precision, int]


class ExpertsReport(_Report):
    """The routed experts: `combinations` is C(experts, top_k), the sets that a token can choose in one layer."""

    moe_layers: int
    experts: int
    top_k: int
    combinations: int
    parameters_each: int
    flops_per_token_and_layer: int


class KvContextReport(_Report):
    """KV of one sequence: `hybrid` where chunked layers keep one chunk, `naive` where every layer keeps everything."""

    context: int
    hybrid: int
    naive: int
    full_layer: int
    chunked_layer: int | None


class KvReport(_Report):
    bytes_per_token_and_layer: int
    bytes_per_token: int
    full_layers: int
    chunked_layers: int
    chunk: int | None
    contexts: tuple[KvContextReport, ...]


class LeastReport(_Report):
    """The least hardware: `by_memory` if weights and KV could be cut at will, the others in Herder's layout.

    The latter are None where no number of devices is enough.
    """

    by_memory: int
    attention: int | None
    experts: int | None
    devices: int | None
    nodes: int | None


class RoleReport(_Report):
    """One role's actors: what the fullest of them holds, and what its device, or its part of one, has room for."""

    actors: int
    weights: int
    kv: int
    room: int

    @property
    def fits(self) -> bool:
        return self.weights + self.kv <= self.room


class NodeReport(_Report):
    """The ranks of a node's attention actors, and its expert slots."""

    attention: tuple[int, ...]
    experts: tuple[int, ...]


class VisionReport(_Report):
    """The image encoder's replicas, where a configuration says how many."""

    min_replicas: int
    max_replicas: int
    device: Literal["cpu", "cuda"]
    weights: int


class LayoutReport(_Report):
    """Where the actors go. `experts_per_actor`: experts of each MoE layer, slot by slot.

    `sequences`: how many of the planned context can run at once. `vision`: None without an image encoder, or without a
    configuration.
    """

    devices: int
    attention: RoleReport
    experts: RoleReport | None
    experts_per_actor: tuple[int, ...]
    nodes: tuple[NodeReport, ...]
    sequences: int
    vision: VisionReport | None


class TransferReport(_Report):
    """All-to-all: rows to the experts and back. `off_node_share`: of them, that go to another node."""

    bytes_per_token_and_layer: int
    bytes_per_token: int
    off_node_share: float | None


class DecodeReport(_Report):
    """The roofline at one batch. `fits`: whether so many sequences' KV does."""

    batch: int
    tokens_per_s: float
    attention_s: float
    experts_s: float
    transfer_s: float
    limit: Limit
    fits: bool


class SpeedReport(_Report):
    """Upper bounds of decoding.

    `flops_per_token`: at the planned context. `single_stream_tokens_per_s`: if one device read all active weights and
    the KV of one sequence. `compute_bound_rows`: rows of an expert from which on it is bound by compute;
    `compute_bound_batch`: the batch that brings it so many. `decode`: in the layout; empty without one.
    """

    flops_per_token: int
    single_stream_tokens_per_s: float
    compute_bound_rows: float
    compute_bound_batch: int | None
    decode: tuple[DecodeReport, ...]


class MachineReport(_Report):
    name: str
    title: str
    devices_per_node: int
    memory: int
    bandwidth: float
    flops_per_s: float
    computes_in: Precision
    link: float
    network: float
    sources: tuple[str, ...]


class DeploymentPlan(_Report):
    """A model on a kind of machine. `misfit`: in one sentence, why it cannot be laid out so."""

    version: Literal[1] = 1
    model: str
    machine: MachineReport
    precision: Precision
    context: int
    batch: int
    parameters: ParametersReport
    experts: ExpertsReport | None
    kv: KvReport
    least: LeastReport
    layout: LayoutReport | None
    misfit: str | None
    transfer: TransferReport | None
    speed: SpeedReport
    assumptions: tuple[str, ...]


class Comparison(_Report):
    """Several models on one kind of machine."""

    version: Literal[1] = 1
    plans: tuple[DeploymentPlan, ...]
