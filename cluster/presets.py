"""Published models by name, so that they can be planned for without their files.

Each has the values of its config.json on Hugging Face that decide what it costs (`repository`), read in the same way as
those of a checkpoint directory.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.checkpoint_shape import shape_of, shape_of_dir
from cluster.config_errors import ConfigError
from cluster.model_shape import ModelShape


@dataclass(frozen=True, slots=True)
class Preset:
    """A published model: where its config.json is, and what matters of it."""

    repository: str
    config: Mapping[str, Any]


_LLAMA4_VISION = {
    "hidden_size": 1408,
    "intermediate_size": 5632,
    "num_hidden_layers": 34,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
}
_LLAMA4_TEXT = {
    "vocab_size": 202048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 8192,
    "tie_word_embeddings": False,
}

PRESETS: dict[str, Preset] = {
    "scout": Preset(
        "meta-llama/Llama-4-Scout-17B-16E",
        {
            "model_type": "llama4",
            "text_config": _LLAMA4_TEXT
            | {"num_local_experts": 16, "interleave_moe_layer_step": 1, "max_position_embeddings": 10_485_760},
            "vision_config": _LLAMA4_VISION,
        },
    ),
    "maverick": Preset(
        "meta-llama/Llama-4-Maverick-17B-128E",
        {
            "model_type": "llama4",
            "text_config": _LLAMA4_TEXT
            | {"num_local_experts": 128, "interleave_moe_layer_step": 2, "max_position_embeddings": 1_048_576},
            "vision_config": _LLAMA4_VISION,
        },
    ),
    "mixtral-8x7b": Preset(
        "mistralai/Mixtral-8x7B-v0.1",
        {
            "model_type": "mixtral",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 32768,
        },
    ),
    "deepseek-v3": Preset(
        "deepseek-ai/DeepSeek-V3",
        {
            "model_type": "deepseek_v3",
            "vocab_size": 129280,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 61,
            "first_k_dense_replace": 3,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "num_attention_heads": 128,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "max_position_embeddings": 163840,
        },
    ),
    "llama-3.1-405b": Preset(
        "meta-llama/Llama-3.1-405B",
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 16384,
            "intermediate_size": 53248,
            "num_hidden_layers": 126,
            "num_attention_heads": 128,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
        },
    ),
}


def find_model(model: str) -> ModelShape:
    """The preset of that name, or the checkpoint in that directory. Raises ConfigError if it is neither."""
    if model.lower() in PRESETS:
        return preset_shape(model.lower())
    if Path(model).expanduser().is_dir():
        return shape_of_dir(Path(model).expanduser())
    near = difflib.get_close_matches(model.lower(), PRESETS, n=1)
    hint = f"; the nearest is {near[0]}" if near else ""
    raise ConfigError([f"{model} is neither a directory nor one of {', '.join(PRESETS)}{hint}"])


def model_at(path: Path) -> ModelShape:
    """The checkpoint in `path`; if it is not here, the published model whose repository is called so (or so-Instruct).

    Raises ConfigError naming model.path.
    """
    if path.is_dir():
        return shape_of_dir(path)
    for name, preset in PRESETS.items():
        if path.name.lower().startswith(preset.repository.rpartition("/")[2].lower()):
            return preset_shape(name)
    raise ConfigError([f"model.path: there is no directory {path}, and no published model is known by that name"])


def preset_shape(name: str) -> ModelShape:
    return shape_of(PRESETS[name].config, name, source=f"preset {name}")
