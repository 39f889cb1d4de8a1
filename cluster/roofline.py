"""How fast a deployment could decode at most: the roofline of each phase of a step (Williams et al., CACM 2009).

A phase takes as long as its memory traffic or its arithmetic, whichever is longer; phases follow each other. Kernel
launches, network latency, sampling and the overlap of dispatch with the shared expert are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cluster.machines import Machine
from cluster.model_shape import ModelShape, Precision, activation_bytes, weight_bytes

Limit = Literal["attention memory", "attention compute", "expert memory", "expert compute", "transfer"]


@dataclass(frozen=True, slots=True)
class Split:
    """How many actors share how many devices and nodes.

    `held` has an entry for each expert actor: how many experts of every MoE layer it has.
    """

    attention: int
    held: tuple[int, ...]
    devices: int
    nodes: int


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of the busiest actor in each phase of one decoding step, and what most of the step goes to."""

    attention_s: float
    experts_s: float
    transfer_s: float
    limit: Limit

    @property
    def seconds(self) -> float:
        return self.attention_s + self.experts_s + self.transfer_s


def decode_step(
    shape: ModelShape, machine: Machine, precision: Precision, context: int, batch: int, split: Split
) -> StepTime:
    """One token for each of `batch` sequences of `context` tokens, spread evenly over the attention actors.

    Routing is uniform: an expert actor reads those of its experts that on average some token chose, and copies of an
    expert get even shares of its rows. Actors that share a device take turns.
    """
    bandwidth, rate = machine.bandwidth, machine.rate(precision)
    own = max(1.0, batch / split.attention)
    turns = max(1.0, split.attention / split.devices)
    attention_bytes = weight_bytes(shape.read_per_step, precision) + own * shape.kv_bytes(context, precision)
    attention_flops = own * (2 * shape.read_per_step + shape.attention_flops(context))
    attention = turns * attention_bytes / bandwidth, turns * attention_flops / rate
    moe = shape.moe
    if moe is None:
        return _step(attention, (0.0, 0.0), 0.0)

    turns = max(1.0, len(split.held) / split.devices)
    read = max(1.0, moe.touched(batch) * max(split.held) / moe.experts) * weight_bytes(
        shape.expert_parameters, precision
    )
    rows = max(1.0, batch * moe.top_k * max(split.held) / sum(split.held))
    experts = moe.layers * turns * read / bandwidth, moe.layers * turns * rows * shape.expert_flops / rate

    busiest = max(rows, own * moe.top_k) * row_bytes(shape, precision)
    off_node = 1 - 1 / split.nodes
    one_way = max(busiest * (1 - off_node) / machine.link, busiest * off_node / machine.network)
    return _step(attention, experts, 2 * moe.layers * one_way)


def _step(attention: tuple[float, float], experts: tuple[float, float], transfer: float) -> StepTime:
    """From (memory, compute) seconds of the two roles."""
    times: dict[Limit, float] = {
        "attention memory": attention[0],
        "attention compute": attention[1],
        "expert memory": experts[0],
        "expert compute": experts[1],
        "transfer": transfer,
    }
    return StepTime(max(attention), max(experts), transfer, max(times, key=lambda name: times[name]))


def row_bytes(shape: ModelShape, precision: Precision) -> int:
    """Of one token's vector, as it travels to an expert and back."""
    return shape.hidden * activation_bytes(precision)


def compute_bound_rows(machine: Machine, precision: Precision) -> float:
    """Rows of a matrix product from which on it takes longer to multiply than to read the weights."""
    return machine.rate(precision) * weight_bytes(2, precision) / 2 / (2 * machine.bandwidth)


def compute_bound_batch(shape: ModelShape, machine: Machine, precision: Precision) -> int | None:
    """The batch at which each routed expert gets so many rows, batch * top_k / experts; None without experts."""
    moe = shape.moe
    return round(compute_bound_rows(machine, precision) * moe.experts / moe.top_k) if moe else None


def single_stream_bound(shape: ModelShape, machine: Machine, precision: Precision, context: int) -> float:
    """Tokens/s of one sequence if one device read all active weights and the KV, whether they fit there or not."""
    moe = shape.moe
    chosen = moe.layers * moe.top_k * shape.expert_parameters if moe else 0
    read = weight_bytes(shape.read_per_step + chosen, precision) + shape.kv_bytes(context, precision)
    return machine.bandwidth / read
