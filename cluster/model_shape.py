"""What a decoder-only transformer weighs and what a token costs in it: parameters, KV cache, FLOPs. Pure arithmetic.

A multiply-add counts as two FLOPs. An MLP is gated: three matrices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Precision = Literal["fp32", "bf16", "fp8", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
WEIGHT_BYTES: dict[Precision, float] = {"fp32": 4, "bf16": 2, "fp8": 1, "int8": 1, "int4": 0.5}
Part = Literal[
    "routed experts",
    "shared experts",
    "routers",
    "dense MLPs",
    "attention",
    "norms",
    "embedding",
    "output head",
    "vision",
]


def activation_bytes(precision: Precision) -> int:
    """Bytes of one number of a row or of the KV cache: lower precisions than BF16 are those of weights alone."""
    return 4 if precision == "fp32" else 2


@dataclass(frozen=True, slots=True)
class GroupedAttention:
    """Query heads in groups that share a key/value head; one head each is plain multi-head attention."""

    heads: int
    kv_heads: int
    head_dim: int
    bias: bool = False

    def parameters(self, hidden: int) -> int:
        """Of one layer, for rows of width `hidden`."""
        weights = 2 * hidden * self.head_dim * (self.heads + self.kv_heads)
        return weights + (self.head_dim * (self.heads + 2 * self.kv_heads) + hidden if self.bias else 0)

    @property
    def kv_values(self) -> int:
        """Numbers that one layer caches for a token."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def flops_per_key(self) -> int:
        """Of one token and layer, for each key that it attends to: the score, and the weighted value."""
        return 4 * self.heads * self.head_dim


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): one compressed vector per token is cached.

    `query_rank`, `kv_rank`: width of the compressed queries, keys and values. `nope_dim`, `rope_dim`: the parts of a
    head's query and key without and with RoPE; the latter's key is shared by all heads. `value_dim`: of a head.
    """

    heads: int
    query_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int

    def parameters(self, hidden: int) -> int:
        """Of one layer, with the norms of the two compressed vectors."""
        query = self.query_rank * (hidden + self.heads * (self.nope_dim + self.rope_dim) + 1)
        down = hidden * (self.kv_rank + self.rope_dim)
        up = self.kv_rank * (self.heads * (self.nope_dim + self.value_dim) + 1)
        return query + down + up + self.heads * self.value_dim * hidden

    @property
    def kv_values(self) -> int:
        """Numbers that one layer caches for a token."""
        return self.kv_rank + self.rope_dim

    @property
    def flops_per_key(self) -> int:
        """As decoding does it: the up-projections absorbed into query and output, so that keys stay compressed."""
        return 2 * self.heads * (2 * self.kv_rank + self.rope_dim)


@dataclass(frozen=True, slots=True)
class Moe:
    """The layers with routed experts: how many, and each one's experts.

    `width`: of a routed expert's MLP. `shared_width`: of the MLP that every token passes beside them; 0: none.
    `router_bias`: whether the router has a number per expert besides its matrix.
    """

    layers: int
    experts: int
    top_k: int
    width: int
    shared_width: int = 0
    router_bias: bool = False

    @property
    def combinations(self) -> int:
        """How many sets of experts a token can choose in one layer: C(experts, top_k)."""
        return math.comb(self.experts, self.top_k)

    def touched(self, batch: int) -> float:
        """Experts of a layer that some of `batch` tokens chose, on average, if all are equally likely."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** batch)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model's dimensions, as far as they cost anything.

    `dense_width`: of the MLP in layers without routed experts. `chunked_layers`: how many attend within chunks of
    `chunk` tokens; the others attend to all. `tied`: the embedding is the output head as well. `vision_parameters`: of
    the image encoder with its projector.
    """

    name: str
    hidden: int
    layers: int
    vocab: int
    attention: GroupedAttention | LatentAttention
    moe: Moe | None
    dense_width: int
    max_context: int
    tied: bool = False
    chunked_layers: int = 0
    chunk: int = 0
    vision_parameters: int = 0

    @property
    def parts(self) -> dict[Part, int]:
        """Parameters by what they are for, the largest kinds first."""
        moe = self.moe
        return {
            "routed experts": moe.layers * moe.experts * self.expert_parameters if moe else 0,
            "shared experts": moe.layers * 3 * self.hidden * moe.shared_width if moe else 0,
            "dense MLPs": (self.layers - (moe.layers if moe else 0)) * 3 * self.hidden * self.dense_width,
            "attention": self.layers * self.attention.parameters(self.hidden),
            "embedding": self.vocab * self.hidden,
            "output head": 0 if self.tied else self.vocab * self.hidden,
            "vision": self.vision_parameters,
            "routers": moe.layers * moe.experts * (self.hidden + moe.router_bias) if moe else 0,
            "norms": (2 * self.layers + 1) * self.hidden,
        }

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def active(self) -> int:
        """Parameters that a text token goes through: both tables, and of the experts those that it chose."""
        return self.beside_experts + (self.moe.layers * self.moe.top_k * self.expert_parameters if self.moe else 0)

    @property
    def beside_experts(self) -> int:
        """Parameters of the text model that are no routed experts': what every attention actor holds."""
        parts = self.parts
        return self.total - parts["routed experts"] - parts["vision"]

    @property
    def read_per_step(self) -> int:
        """Those of `beside_experts` that a step multiplies with; of the embedding it only looks rows up."""
        return self.beside_experts - (0 if self.tied else self.parts["embedding"])

    @property
    def expert_parameters(self) -> int:
        """Of one routed expert in one layer; 0 without experts."""
        return 3 * self.hidden * self.moe.width if self.moe else 0

    @property
    def expert_flops(self) -> int:
        """Of one token in one routed expert of one layer."""
        return 2 * self.expert_parameters

    def flops(self, context: int) -> int:
        """Of one token of text at position `context`: all matrices, and attention over what is before it."""
        return 2 * (self.active - (self.beside_experts - self.read_per_step)) + self.attention_flops(context)

    def attention_flops(self, context: int) -> int:
        """Of one token at position `context`: scores and weighted values in all layers."""
        return self.attention.flops_per_key * self._kept_tokens(context)

    def kv_bytes(self, context: int, precision: Precision) -> int:
        """Of one sequence of `context` tokens, if a chunked layer keeps one chunk and the others everything."""
        return self.kv_token_bytes(precision) * self._kept_tokens(context)

    def naive_kv_bytes(self, context: int, precision: Precision) -> int:
        """Of one sequence of `context` tokens, if every layer keeps everything."""
        return self.kv_token_bytes(precision) * self.layers * context

    def kv_token_bytes(self, precision: Precision) -> int:
        """Of one token in one layer."""
        return self.attention.kv_values * activation_bytes(precision)

    def _kept_tokens(self, context: int) -> int:
        """Tokens, over all layers, that one sequence has in the cache."""
        full = self.layers - self.chunked_layers
        return full * context + self.chunked_layers * min(context, self.chunk)


def weight_bytes(parameters: float, precision: Precision) -> int:
    """Of that many parameters; the scales of quantised ones are not counted."""
    return math.ceil(parameters * WEIGHT_BYTES[precision])
