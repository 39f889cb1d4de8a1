"""The oracle of the parity tests: random small checkpoints that transformers writes, and its outputs for them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from llama4.config import TextConfig

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 24,
    "intermediate_size_mlp": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 7,
    "floor_scale": 4,
    "attn_scale": 0.5,
    "max_position_embeddings": 512,
}
SMALL_VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vision_output_dim": 16,
    "image_size": 28,
    "patch_size": 14,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
}
PATCH_TOKEN = 60


def save_random(
    path: str | Path,
    *,
    seed: int,
    conditional: bool = False,
    vision: Mapping[str, object] | None = None,
    max_shard_size: str = "5GB",
    dtype: torch.dtype = torch.float32,
    **overrides: object,
) -> TextConfig:
    """Writes a random checkpoint of `SMALL` shape with `overrides`, and returns its config.

    `conditional` writes `Llama4ForConditionalGeneration` with a vision tower of `SMALL_VISION` shape with what `vision`
    overrides, else `Llama4ForCausalLM`. The weights are large enough that routing, chunks, positions and the query
    temperature show in the logits.
    """
    text = {**SMALL, **overrides}
    text_config = transformers.Llama4TextConfig(**text)
    if conditional:
        tie = bool(text.get("tie_word_embeddings", False))
        both = transformers.Llama4Config(
            text_config=text_config.to_dict(),
            vision_config={**SMALL_VISION, **(vision or {})},
            image_token_index=PATCH_TOKEN,
            tie_word_embeddings=tie,
        )
        model = transformers.Llama4ForConditionalGeneration(both)
    else:
        model = transformers.Llama4ForCausalLM(text_config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1 + 0.2 * noise)
            elif weight.dim() == 1:
                weight.copy_(0.5 * noise)
            elif "embed_tokens" in name:
                weight.copy_(noise / weight.shape[1] ** 0.5)
            else:
                fan_in = weight.shape[-2] if "experts.gate_up" in name or "experts.down" in name else weight.shape[-1]
                gain = 2.0 if "q_proj" in name or "k_proj" in name or "router" in name else 1.0
                weight.copy_(noise * gain / fan_in**0.5)
            weight.data = weight.to(dtype)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return TextConfig.from_dir(path)


def reference_logits(path: str | Path, token_ids: Sequence[int], tiles_NCHW: Tensor | None = None) -> Tensor:
    """transformers' float32 logits [T, V] of a whole prefill, without a cache; `tiles_NCHW` of its images, if any."""
    model = _load(path)
    text = getattr(model, "language_model", model)
    if text.config.attention_chunk_size is None:  # transformers wants a number; None is Herder's "all of it"
        text.config.attention_chunk_size = 1 << 20
    ids = torch.tensor([list(token_ids)])
    with torch.no_grad():
        output = text(ids, use_cache=False) if tiles_NCHW is None else model(ids, tiles_NCHW, use_cache=False)
    logits: Tensor = output.logits[0]
    return logits.float()


def reference_embeddings(path: str | Path, tiles_NCHW: Tensor) -> Tensor:
    """transformers' float32 embeddings of tiles [N, M, D]: the encoder's and the projector's work."""
    model = _load(path)
    with torch.no_grad():
        embeddings_NMD: Tensor = model.multi_modal_projector(model.vision_model(tiles_NCHW).last_hidden_state)
    return embeddings_NMD


def _load(path: str | Path) -> Any:
    architecture = json.loads((Path(path) / "config.json").read_text())["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
