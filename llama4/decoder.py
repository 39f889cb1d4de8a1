"""The text decoder: embedding, layers, final norm and head, over a step's ragged batch.

Shapes: T rows of the step, N chosen rows, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llama4.attention import Attention
from llama4.config import TextConfig
from llama4.kv_pages import Batch, KVPages
from llama4.linear import linear
from llama4.memory import zeros
from llama4.micro_batches import in_turn
from llama4.moe import MLP, Dispatcher, Flow, MoE
from llama4.norm import RMSNorm
from llama4.plan import StepPlan, plan_step
from llama4.rope import inverse_frequencies


class Layer:
    """Attention, then experts or a dense MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: TextConfig, layer: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.attention = Attention(config, layer, dtype, device)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.feed_forward: MoE | MLP = (
            MoE(config, layer, dtype, device)
            if layer in config.moe_layers
            else MLP(config.hidden_size, config.intermediate_size_mlp, dtype, device)
        )

    def tensors(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's names and where each tensor is kept."""
        yield f"{prefix}.input_layernorm.weight", self.attention_norm.weight
        yield from self.attention.tensors(f"{prefix}.self_attn")
        yield f"{prefix}.post_attention_layernorm.weight", self.feed_forward_norm.weight
        yield from self.feed_forward.tensors(f"{prefix}.feed_forward")

    def flow(self, h_TD: Tensor, plan: StepPlan, kv: KVPages, dispatcher: Dispatcher) -> Flow:
        """The next residual stream; pauses when its rows are with the experts."""
        h_TD = self.attention(self.attention_norm(h_TD), plan, kv).add_(h_TD)
        x_TD = self.feed_forward_norm(h_TD)
        if isinstance(self.feed_forward, MoE):
            y_TD = yield from self.feed_forward.flow(x_TD, dispatcher)
            return y_TD.add_(h_TD)
        return self.feed_forward(x_TD).add_(h_TD)


class Decoder:
    """The whole text model but for the routed experts. `weights.load_decoder` makes one with its weights filled in."""

    def __init__(self, config: TextConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        self.config = config
        self._embedding = zeros((config.vocab_size, config.hidden_size), dtype, device)
        self._layers = [Layer(config, n, dtype, device) for n in range(config.num_hidden_layers)]
        self._norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self._head = self._embedding if config.tie_word_embeddings else zeros(self._embedding.shape, dtype, device)
        self._frequencies_F = inverse_frequencies(config, device)

    @property
    def nbytes(self) -> int:
        """The size of all weights."""
        return sum(tensor.nbytes for _, tensor in self.tensors())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's names (without `language_model.`) and where each tensor is kept."""
        yield "model.embed_tokens.weight", self._embedding
        for n, layer in enumerate(self._layers):
            yield from layer.tensors(f"model.layers.{n}")
        yield "model.norm.weight", self._norm.weight
        if self._head is not self._embedding:
            yield "lm_head.weight", self._head

    def __call__(self, batch: Batch, kv: KVPages, dispatcher: Dispatcher) -> Tensor:
        """One step: the rows' hidden states h_TD after the final norm; their keys and values are in `kv` afterwards.

        `dispatcher` reaches the experts, for this step; without rows it is still called once per MoE layer, in order.
        """
        return in_turn([self._flow(batch, kv, dispatcher)])[0]

    def micro_batches(self, parts: Sequence[tuple[Batch, Dispatcher]], kv: KVPages) -> Tensor:
        """One step in parts, whose attention and experts overlap: the h_TD of all parts, one after the other.

        No part may attend to what another one writes.
        """
        return torch.cat(in_turn([self._flow(batch, kv, dispatcher) for batch, dispatcher in parts]))

    def _flow(self, batch: Batch, kv: KVPages, dispatcher: Dispatcher) -> Flow:
        plan = plan_step(self.config, batch, kv.page_size, self._frequencies_F, self._embedding.dtype)
        h_TD = self._embed(batch)
        for layer in self._layers:
            h_TD = yield from layer.flow(h_TD, plan, kv, dispatcher)
        return self._norm(h_TD)

    def _embed(self, batch: Batch) -> Tensor:
        h_TD = F.embedding(batch.token_ids_T.to(self._embedding.device), self._embedding)
        if batch.images is not None:
            h_TD.index_copy_(0, batch.images.rows_N.to(h_TD.device), batch.images.inputs_ND.to(h_TD))
        return h_TD

    def logits(self, h_ND: Tensor) -> Tensor:
        """The next token's logits, float32 [N, V]."""
        return linear(h_ND, self._head).float()
