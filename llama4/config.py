"""The text model's shape, read from a checkpoint's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from llama4.config_reader import ConfigReader, read_config

LayerKind = Literal["full", "chunked"]
RouterScores = Literal["sigmoid", "softmax"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """The parameters of llama3-type RoPE scaling; see `rope.inverse_frequencies`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class TextConfig:
    """A Llama 4 text model's shape. The names are those of config.json, but for these:

    `rope_layers`: the layers with RoPE (the others have none, and a query temperature instead).
    `layer_kinds`: per layer, whether it attends to the whole sequence or within chunks of `attention_chunk_size`.
    `moe_layers`: the layers with experts (the others have a dense MLP of width `intermediate_size_mlp`).
    `router_scores`: "sigmoid" multiplies sigmoid(logit) into an expert's input, as Llama 4 does; "softmax" weights the
    experts' outputs with their probabilities among all experts.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    intermediate_size_mlp: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    num_local_experts: int
    num_experts_per_tok: int
    moe_layers: tuple[int, ...]
    rope_layers: tuple[int, ...]
    layer_kinds: tuple[LayerKind, ...]
    attention_chunk_size: int | None
    rope_theta: float
    rope_scaling: RopeScaling | None
    use_qk_norm: bool
    attn_temperature_tuning: bool
    floor_scale: float
    attn_scale: float
    attention_bias: bool
    tie_word_embeddings: bool
    router_scores: RouterScores = "sigmoid"

    def window_start(self, kind: LayerKind, position: int) -> int:
        """The first position that the token at `position` attends to in layers of this kind."""
        if kind == "full":
            return 0
        assert self.attention_chunk_size is not None
        return position - position % self.attention_chunk_size

    @classmethod
    def from_dir(cls, path: str | Path, router_scores: RouterScores = "sigmoid") -> TextConfig:
        """Reads `path`/config.json. Raises ValueError, naming file and key, if it is missing, broken or not Llama 4."""
        file = Path(path) / "config.json"
        return cls.from_dict(read_config(file), router_scores, source=str(file))

    @classmethod
    def from_dict(
        cls, values: Mapping[str, object], router_scores: RouterScores = "sigmoid", source: str = "config.json"
    ) -> TextConfig:
        """From config.json's content: `Llama4ForConditionalGeneration`'s (its `text_config`) or `Llama4ForCausalLM`'s.

        Raises ValueError with a sentence that names `source` and the key.
        """
        model_type = values.get("model_type", "llama4_text")
        if model_type not in ("llama4", "llama4_text"):
            raise ValueError(f"{source}: model_type is {model_type!r}, but only llama4 and llama4_text are served")
        read = ConfigReader(values, source)
        if isinstance(values.get("text_config"), Mapping):
            read = read.section("text_config")
        if router_scores not in get_args(RouterScores):
            raise ValueError(f"router_scores must be sigmoid or softmax, not {router_scores!r}")

        layers = read.integer("num_hidden_layers")
        hidden = read.integer("hidden_size")
        heads = read.integer("num_attention_heads")
        kv_heads = read.integer("num_key_value_heads", heads)
        head_dim = read.integer("head_dim", hidden // heads)
        intermediate = read.integer("intermediate_size")
        experts = read.integer("num_local_experts")
        per_token = read.integer("num_experts_per_tok", 1)
        context = read.integer("max_position_embeddings", 131072)
        read.check("num_key_value_heads", heads % kv_heads == 0, f"divide num_attention_heads ({heads})")
        read.check("head_dim", head_dim % 2 == 0, "be even")
        read.check("num_experts_per_tok", per_token <= experts, f"be at most num_local_experts ({experts})")
        read.check("hidden_act", read.get("hidden_act", "silu") == "silu", "be silu")

        chunk = None if read.is_null("attention_chunk_size") else read.integer("attention_chunk_size", 8192)
        interval = read.integer("no_rope_layer_interval", 4)
        has_rope = read.integers("no_rope_layers") or [int((layer + 1) % interval != 0) for layer in range(layers)]
        read.check("no_rope_layers", len(has_rope) >= layers, f"have an entry per layer ({layers})")
        default_types = ["chunked_attention" if rope else "full_attention" for rope in has_rope[:layers]]
        types = read.strings("layer_types") or default_types
        read.check("layer_types", len(types) == layers, f"have an entry per layer ({layers})")
        known = {"full_attention", "chunked_attention"}
        read.check("layer_types", known.issuperset(types), "be made of full_attention and chunked_attention")
        step = read.integer("interleave_moe_layer_step", 1)
        moe_layers = read.integers("moe_layers")
        if moe_layers is None:
            moe_layers = list(range(step - 1, layers, step))
        read.check("moe_layers", all(0 <= n < layers for n in moe_layers), f"be layers between 0 and {layers - 1}")

        theta, scaling = _rope(read, context)
        return cls(
            vocab_size=read.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=intermediate,
            intermediate_size_mlp=read.integer("intermediate_size_mlp", 16384),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=read.number("rms_norm_eps", 1e-5),
            max_position_embeddings=context,
            num_local_experts=experts,
            num_experts_per_tok=per_token,
            moe_layers=tuple(sorted(set(moe_layers))),
            rope_layers=tuple(layer for layer in range(layers) if has_rope[layer]),
            layer_kinds=tuple("full" if chunk is None or t == "full_attention" else "chunked" for t in types),
            attention_chunk_size=chunk,
            rope_theta=theta,
            rope_scaling=scaling,
            use_qk_norm=read.flag("use_qk_norm", True),
            attn_temperature_tuning=read.flag("attn_temperature_tuning", True),
            floor_scale=read.number("floor_scale", 8192),
            attn_scale=read.number("attn_scale", 0.1),
            attention_bias=read.flag("attention_bias", False),
            tie_word_embeddings=read.flag("tie_word_embeddings", False),
            router_scores=router_scores,
        )


def _rope(read: ConfigReader, context: int) -> tuple[float, RopeScaling | None]:
    """RoPE's base and scaling from `rope_parameters` (new spelling) or from `rope_theta` and `rope_scaling` (old)."""
    key = "rope_parameters" if isinstance(read.get("rope_parameters", None), Mapping) else "rope_scaling"
    rope = read.section(key)
    theta = rope.number("rope_theta", read.number("rope_theta", 500000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    rope.check("rope_type", kind == "llama3", "be default or llama3")
    return theta, RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=rope.integer("original_max_position_embeddings", context),
    )
