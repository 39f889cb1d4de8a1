"""A checkpoint's config.json as a `ModelShape`: Llama 4's, and those of the families that it is compared with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.config_errors import ConfigError, sentences
from cluster.model_shape import GroupedAttention, LatentAttention, ModelShape, Moe
from llama4.config import TextConfig
from llama4.vision_config import VisionConfig

Count = Annotated[int, Field(ge=1)]


def shape_of_dir(path: Path) -> ModelShape:
    """Of the checkpoint in `path`, of which only config.json is read. Raises ConfigError naming file and key."""
    file = path / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"{file} cannot be read: {error.strerror}"]) from None
    except ValueError as error:
        raise ConfigError([f"{file} is not JSON: {error}"]) from None
    if not isinstance(values, dict):
        raise ConfigError([f"{file} must hold a JSON object"])
    return shape_of(values, path.resolve().name, source=str(file))


def shape_of(values: Mapping[str, Any], name: str, source: str = "config.json") -> ModelShape:
    """The shape that a config.json's content describes. Raises ConfigError naming `source` and the key."""
    kind = values.get("model_type")
    if kind in ("llama4", "llama4_text"):
        try:
            text = TextConfig.from_dict(values, source=source)
            vision = VisionConfig.from_dict(values, source)
        except ValueError as error:
            raise ConfigError([str(error)]) from None
        return text_shape(text, name, _vision_parameters(vision) if vision else 0)
    if kind not in _FAMILIES:
        known = ", ".join(["llama4", "llama4_text", *_FAMILIES])
        raise ConfigError([f"{source}: model_type is {kind!r}; what can be planned is {known}"])
    return _read(_FAMILIES[kind], values, source).shape(name)


def text_shape(text: TextConfig, name: str, vision_parameters: int = 0) -> ModelShape:
    """A Llama 4 text model's shape. Its shared expert is as wide as a routed one."""
    moe_layers = len(text.moe_layers)
    return ModelShape(
        name=name,
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        vocab=text.vocab_size,
        attention=GroupedAttention(
            text.num_attention_heads, text.num_key_value_heads, text.head_dim, bias=text.attention_bias
        ),
        moe=Moe(
            layers=moe_layers,
            experts=text.num_local_experts,
            top_k=text.num_experts_per_tok,
            width=text.intermediate_size,
            shared_width=text.intermediate_size,
        )
        if moe_layers
        else None,
        dense_width=text.intermediate_size_mlp,
        max_context=text.max_position_embeddings,
        tied=text.tie_word_embeddings,
        chunked_layers=text.layer_kinds.count("chunked"),
        chunk=text.attention_chunk_size or 0,
        vision_parameters=vision_parameters,
    )


def _vision_parameters(vision: VisionConfig) -> int:
    """Of Llama 4's image encoder with the adapter behind its pixel shuffle, and of the projector."""
    width, inner, adapter = vision.hidden_size, vision.intermediate_size, vision.adapter_size
    norm = 2 * width  # weight and bias
    layer = 4 * (width**2 + width) + 2 * width * inner + inner + width + 2 * norm
    places = vision.patches**2 + 1  # one of them the class token's
    embedding = vision.num_channels * vision.patch_size**2 * width + width + places * width + 2 * norm
    projection = adapter * (width * vision.shuffle**2 + adapter + vision.text_hidden_size)
    return embedding + vision.num_hidden_layers * layer + projection


class _Json(BaseModel):
    """A part of a config.json; keys that cost nothing are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class LlamaJson(_Json):
    """Llama 2 and 3: dense."""

    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    vocab_size: Count
    max_position_embeddings: Count
    tie_word_embeddings: bool = False

    def shape(self, name: str, moe: Moe | None = None) -> ModelShape:
        heads = self.num_attention_heads
        return ModelShape(
            name=name,
            hidden=self.hidden_size,
            layers=self.num_hidden_layers,
            vocab=self.vocab_size,
            attention=GroupedAttention(
                heads, self.num_key_value_heads or heads, self.head_dim or self.hidden_size // heads
            ),
            moe=moe,
            dense_width=self.intermediate_size,
            max_context=self.max_position_embeddings,
            tied=self.tie_word_embeddings,
        )


class MixtralJson(LlamaJson):
    """Mixtral: every layer has routed experts, and nothing beside them."""

    num_local_experts: Count
    num_experts_per_tok: Count

    def shape(self, name: str, moe: Moe | None = None) -> ModelShape:
        experts = Moe(self.num_hidden_layers, self.num_local_experts, self.num_experts_per_tok, self.intermediate_size)
        return super().shape(name, moe or experts)


class DeepseekJson(_Json):
    """DeepSeek-V3: latent attention, dense first layers, shared experts. Its multi-token prediction is left out."""

    hidden_size: Count
    intermediate_size: Count
    moe_intermediate_size: Count
    num_hidden_layers: Count
    first_k_dense_replace: Annotated[int, Field(ge=0)]
    moe_layer_freq: Literal[1] = 1
    n_routed_experts: Count
    n_shared_experts: Count
    num_experts_per_tok: Count
    num_attention_heads: Count
    q_lora_rank: Count
    kv_lora_rank: Count
    qk_nope_head_dim: Count
    qk_rope_head_dim: Count
    v_head_dim: Count
    vocab_size: Count
    max_position_embeddings: Count
    tie_word_embeddings: bool = False

    def shape(self, name: str) -> ModelShape:
        return ModelShape(
            name=name,
            hidden=self.hidden_size,
            layers=self.num_hidden_layers,
            vocab=self.vocab_size,
            attention=LatentAttention(
                heads=self.num_attention_heads,
                query_rank=self.q_lora_rank,
                kv_rank=self.kv_lora_rank,
                nope_dim=self.qk_nope_head_dim,
                rope_dim=self.qk_rope_head_dim,
                value_dim=self.v_head_dim,
            ),
            moe=Moe(
                layers=self.num_hidden_layers - self.first_k_dense_replace,
                experts=self.n_routed_experts,
                top_k=self.num_experts_per_tok,
                width=self.moe_intermediate_size,
                shared_width=self.n_shared_experts * self.moe_intermediate_size,
                router_bias=True,
            ),
            dense_width=self.intermediate_size,
            max_context=self.max_position_embeddings,
            tied=self.tie_word_embeddings,
        )


AnyJson = TypeVar("AnyJson", bound=_Json)
_FAMILIES: dict[str, type[LlamaJson] | type[DeepseekJson]] = {
    "llama": LlamaJson,
    "mixtral": MixtralJson,
    "deepseek_v3": DeepseekJson,
}


def _read(kind: type[AnyJson], values: Any, source: str) -> AnyJson:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = [problem for fault in error.errors() for problem in sentences(fault, kind)]
        raise ConfigError([f"{source}: {problem}" for problem in problems]) from None
