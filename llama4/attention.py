"""Grouped-query attention of one layer over KV pages.

Shapes: T rows, D model width, H query heads, K key/value heads, E head width, L keys, R = H + K rotated heads.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from llama4 import openmp
from llama4.config import TextConfig
from llama4.kv_pages import KVPages
from llama4.linear import linear
from llama4.memory import zeros
from llama4.norm import Epsilon, normalise_
from llama4.plan import KindPlan, PrefillRun, StepPlan
from llama4.prefill_attention import attend_causally
from llama4.rope import rotate_


class Attention:
    """Queries, keys and values come from one fused projection; keys and values are stored before anything is read."""

    def __init__(self, config: TextConfig, layer: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self._layer = layer
        self._kind = config.layer_kinds[layer]
        self._use_rope = layer in config.rope_layers
        self._norm_eps: Epsilon | None = None
        if config.use_qk_norm and self._use_rope:
            self._norm_eps = Epsilon(config.rms_norm_eps, device)
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_dim = config.head_dim
        query_rows, kv_rows = self._heads * self._head_dim, self._kv_heads * self._head_dim
        rows = query_rows + 2 * kv_rows
        self._parts = {
            "q_proj": slice(0, query_rows),
            "k_proj": slice(query_rows, query_rows + kv_rows),
            "v_proj": slice(query_rows + kv_rows, rows),
        }
        self.qkv_weight = zeros((rows, config.hidden_size), dtype, device)
        self.out_weight = zeros((config.hidden_size, query_rows), dtype, device)
        self.qkv_bias: Tensor | None = None
        self.out_bias: Tensor | None = None
        if config.attention_bias:
            self.qkv_bias = torch.empty(rows, dtype=dtype, device=device)
            self.out_bias = torch.empty(config.hidden_size, dtype=dtype, device=device)

    def tensors(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's names and where each tensor is kept."""
        for name, rows in self._parts.items():
            yield f"{prefix}.{name}.weight", self.qkv_weight[rows]
        yield f"{prefix}.o_proj.weight", self.out_weight
        if self.qkv_bias is not None and self.out_bias is not None:
            for name, rows in self._parts.items():
                yield f"{prefix}.{name}.bias", self.qkv_bias[rows]
            yield f"{prefix}.o_proj.bias", self.out_bias

    def __call__(self, x_TD: Tensor, plan: StepPlan, kv: KVPages) -> Tensor:
        """The attention's output [T, D]; the rows' keys and values are in the pages afterwards."""
        rotated = self._heads + self._kv_heads
        qkv_TD = linear(x_TD, self.qkv_weight)
        if self.qkv_bias is not None:
            qkv_TD += self.qkv_bias
        qkv_THE = qkv_TD.view(-1, rotated + self._kv_heads, self._head_dim)
        if self._use_rope:
            qk_TRE = qkv_THE[:, :rotated]
            rotate_(qk_TRE, plan.rotation_T1F)
            if self._norm_eps is not None:
                normalise_(qk_TRE, self._norm_eps)
        elif plan.temperature_T11 is not None:
            qkv_THE[:, : self._heads] *= plan.temperature_T11
        q_THE = qkv_THE[:, : self._heads]
        kv_T2KE = qkv_THE[:, self._heads :].view(-1, 2, self._kv_heads, self._head_dim)

        steps = plan.kinds[self._kind]
        written = kv_T2KE if steps.written_rows is None else kv_T2KE[steps.written_rows]
        kv.write(self._layer, steps.slots, written)
        out_TD = linear(self._attend(q_THE, kv_T2KE, steps, plan, kv).flatten(1), self.out_weight)
        return out_TD if self.out_bias is None else out_TD.add_(self.out_bias)

    def _attend(self, q_THE: Tensor, kv_T2KE: Tensor, steps: KindPlan, plan: StepPlan, kv: KVPages) -> Tensor:
        """The weighted values of every row [T, H, E]."""
        out_THE = torch.empty_like(q_THE, memory_format=torch.contiguous_format)
        steps.decode.attend(self._layer, q_THE, kv, out_THE)
        for run in steps.prefill:
            self._prefill(q_THE, kv_T2KE, run, plan, kv, out_THE)
        return out_THE

    def _prefill(
        self, q_THE: Tensor, kv_T2KE: Tensor, run: PrefillRun, plan: StepPlan, kv: KVPages, out_THE: Tensor
    ) -> None:
        """One request's rows within one window."""
        rows = slice(run.start, run.stop)
        kv_2KLE = kv_T2KE[rows].permute(1, 2, 0, 3)
        if run.history:
            past_L2KE = kv.gather(self._layer, run.pages_P)[run.offset : run.offset + run.history]
            kv_2KLE = torch.cat((past_L2KE.permute(1, 2, 0, 3), kv_2KLE), dim=2)
        if openmp.computes(q_THE):
            k_KLE, v_KLE = kv_2KLE.contiguous()
            attend_causally(q_THE[rows], k_KLE, v_KLE, out_THE[rows])
        else:
            _attend_in_blocks(q_THE[rows], kv_2KLE, run.history, plan, out_THE[rows])


def _attend_in_blocks(q_THE: Tensor, kv_2KLE: Tensor, history: int, plan: StepPlan, out_THE: Tensor) -> None:
    """By torch: all rows at once if they are the window's first, else by blocks of queries that share a mask."""
    k_1KLE, v_1KLE = kv_2KLE[:, None]
    rows = q_THE.shape[0]
    block = plan.query_block if history else rows
    for first in range(0, rows, block):
        last = min(rows, first + block)
        keys = history + last
        out_1HQE = F.scaled_dot_product_attention(
            q_THE[None, first:last].transpose(1, 2),
            k_1KLE[:, :, :keys],
            v_1KLE[:, :, :keys],
            attn_mask=plan.prefill_mask(last - first, keys) if history else None,
            is_causal=not history,
            enable_gqa=True,
        )
        out_THE[first:last] = out_1HQE[0].transpose(0, 1)
