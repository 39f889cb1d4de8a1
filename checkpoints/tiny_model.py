"""Shape of the tiny Llama 4 model, and what training adds to the transformers implementation.

Tensor suffixes: T tokens, D model width, E experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers import Llama4Config, Llama4TextConfig, PreTrainedTokenizerFast
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

MAX_POSITIONS = 4096
VOCAB_MULTIPLE = 64


def build_config(tokenizer: PreTrainedTokenizerFast) -> Llama4Config:
    """The configuration: six layers, every second a mixture of 16 experts, the fourth without rotary embeddings."""
    special = tokenizer.convert_tokens_to_ids
    text = Llama4TextConfig(
        vocab_size=-(-len(tokenizer) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        hidden_size=128,
        intermediate_size=128,
        intermediate_size_mlp=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.05,
        num_local_experts=16,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        no_rope_layer_interval=4,
        attention_chunk_size=128,
        floor_scale=1024,
        attn_scale=0.1,
        attn_temperature_tuning=True,
        use_qk_norm=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
        },
        bos_token_id=special("<|begin_of_text|>"),
        eos_token_id=[special(name) for name in ("<|end_of_text|>", "<|eom|>", "<|eot|>")],
        pad_token_id=special("<|finetune_right_pad|>"),
    )
    vision = {
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "image_size": 56,
        "patch_size": 14,
        "projector_input_dim": 128,
        "projector_output_dim": 128,
        "vision_output_dim": 128,
    }
    return Llama4Config(
        text_config=text.to_dict(),
        vision_config=vision,
        boi_token_index=special("<|image_start|>"),
        eoi_token_index=special("<|image_end|>"),
        image_token_index=special("<|patch|>"),
    )


def _grouped_moe_forward(self: Llama4TextMoe, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Llama4TextMoe.forward with each token sent to its own expert only; the stock one runs all experts on all."""
    x_TD = hidden_states.reshape(-1, self.hidden_dim)
    score_TE, logits_TE = self.router(x_TD)
    score_T, expert_T = score_TE.max(dim=-1)
    order_T = expert_T.argsort(stable=True)
    counts_E = expert_T.bincount(minlength=self.num_experts).tolist()
    sorted_TD = (x_TD * score_T[:, None])[order_T]
    experts = self.experts
    routed: list[torch.Tensor] = []
    for rows_TD, gate_up_DF, down_FD in zip(
        sorted_TD.split(counts_E), experts.gate_up_proj.unbind(0), experts.down_proj.unbind(0), strict=True
    ):
        gate_TF, up_TF = (rows_TD @ gate_up_DF).chunk(2, dim=-1)
        routed.append((up_TF * experts.act_fn(gate_TF)) @ down_FD)
    routed_TD = torch.cat(routed)[order_T.argsort()]
    return self.shared_expert(x_TD) + routed_TD, logits_TE


@contextmanager
def grouped_experts() -> Iterator[None]:
    """Within the context, mixture layers compute the same function at one sixteenth of the expert arithmetic."""
    stock = Llama4TextMoe.forward
    Llama4TextMoe.forward = _grouped_moe_forward
    try:
        yield
    finally:
        Llama4TextMoe.forward = stock


def balance_loss(router_logits: Sequence[torch.Tensor], real_T: torch.Tensor) -> torch.Tensor:
    """Auxiliary load-balancing loss, averaged over the mixture layers; 1 when the load is even.

    Equation 4 of Fedus, Zoph and Shazeer, "Switch Transformers: Scaling to Trillion Parameter Models with Simple and
    Efficient Sparsity", JMLR 23 (2022), https://arxiv.org/abs/2101.03961: the number of experts times the sum over
    experts of (share of tokens sent to it) x (mean router probability given to it), probabilities being a softmax.

    Args:
        router_logits: One [T, E] tensor for every mixture layer.
        real_T: Marks the tokens that are not padding; the others do not count.
    """
    losses = []
    for logits_TE in router_logits:
        logits_TE = logits_TE[real_T]
        share_E = F.one_hot(logits_TE.argmax(-1), logits_TE.shape[-1]).float().mean(0)
        probability_E = logits_TE.softmax(-1).mean(0)
        losses.append(logits_TE.shape[-1] * (share_E * probability_E).sum())
    return torch.stack(losses).mean()
