"""What a step must read and compute at least: the denominators of every ratio that bench.engine prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.limits import Limits
from llama4.config import TextConfig

FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class Costs:
    """A text model's weights, in parameters, by how often a step uses them."""

    config: TextConfig

    @property
    def expert(self) -> int:
        """One routed expert of one layer."""
        return 3 * self.config.hidden_size * self.config.intermediate_size

    @property
    def always(self) -> int:
        """All that every row goes through, but for the head: attention, router, shared expert, dense layers, norms."""
        c = self.config
        heads = 2 * c.num_attention_heads + 2 * c.num_key_value_heads
        attention = c.hidden_size * c.head_dim * heads + 2 * c.hidden_size
        sparse = c.num_local_experts * c.hidden_size + 3 * c.hidden_size * c.intermediate_size
        dense = 3 * c.hidden_size * c.intermediate_size_mlp
        moe = len(c.moe_layers)
        return c.num_hidden_layers * attention + moe * sparse + (c.num_hidden_layers - moe) * dense + c.hidden_size

    @property
    def head(self) -> int:
        return self.config.vocab_size * self.config.hidden_size

    def weight_bytes(self, experts_hit: float) -> float:
        """What a step that samples reads: `experts_hit` counts (layer, expert) pairs."""
        return FLOAT32 * (self.always + self.head + experts_hit * self.expert)

    def flops(self, rows: int, sampled: int, past_keys: Sequence[int] = ()) -> float:
        """Multiplications and additions of a step of `rows` rows of which `sampled` get logits.

        `past_keys`: for each row, how many keys it attends to, summed over the layers.
        """
        per_row = self.always + len(self.config.moe_layers) * self.config.num_experts_per_tok * self.expert
        attention = 4 * self.config.num_attention_heads * self.config.head_dim * sum(past_keys)
        return 2.0 * (rows * per_row + sampled * self.head) + attention

    def keys(self, position: int) -> int:
        """Keys that the row at `position` attends to, summed over the layers."""
        return sum(position + 1 - self.config.window_start(kind, position) for kind in self.config.layer_kinds)

    def kv_bytes(self, position: int) -> int:
        """Keys and values that the row at `position` attends to, over all layers."""
        return FLOAT32 * 2 * self.config.num_key_value_heads * self.config.head_dim * self.keys(position)


@dataclass(frozen=True, slots=True)
class Bound:
    """The least time of a step, and what sets it."""

    seconds: float
    by: str

    @classmethod
    def of(cls, limits: Limits, *, nbytes: float, flops: float) -> Bound:
        """Reading the weights once at full bandwidth or computing at the full GEMM rate, whichever takes longer."""
        reading, computing = nbytes / limits.bandwidth, flops / limits.gemm
        return cls(reading, "bandwidth") if reading >= computing else cls(computing, "GEMM")
