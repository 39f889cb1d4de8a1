"""The image encoder's shape, read from a checkpoint's config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llama4.config_reader import ConfigReader, read_config


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """A Llama 4 image encoder's shape. The names are those of config.json's `vision_config`, but for these:

    `shuffle`: as many by as many patches become one token (1 / `pixel_shuffle_ratio`).
    `adapter_size`: the width that both matrices of the adapter give (`projector_input_dim`, `projector_output_dim`).
    `text_hidden_size`: the text model's width, which the projector's result has.
    `patch_token_id`: the token whose place in a prompt an embedding takes (`image_token_index`).
    """

    image_size: int
    patch_size: int
    num_channels: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    rope_theta: float
    shuffle: int
    adapter_size: int
    text_hidden_size: int
    patch_token_id: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def patches(self) -> int:
        """Along each side of a tile."""
        return self.image_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        return (self.patches // self.shuffle) ** 2

    @classmethod
    def from_dir(cls, path: str | Path) -> VisionConfig | None:
        """Reads `path`/config.json; None when it has no `vision_config`: the model takes no images.

        Raises ValueError, naming file and key, if it is missing, broken or not Llama 4's.
        """
        file = Path(path) / "config.json"
        return cls.from_dict(read_config(file), source=str(file))

    @classmethod
    def from_dict(cls, values: Mapping[str, object], source: str = "config.json") -> VisionConfig | None:
        """From config.json's content. Raises ValueError with a sentence that names `source` and the key."""
        section = values.get("vision_config")
        if section is None:
            return None
        whole = ConfigReader(values, source)
        read, text = whole.section("vision_config"), whole.section("text_config")
        image, patch = read.integer("image_size"), read.integer("patch_size")
        hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
        read.check("image_size", image % patch == 0, f"be a multiple of patch_size ({patch})")
        read.check("num_channels", read.integer("num_channels", 3) == 3, "be 3")
        read.check("hidden_size", hidden % (4 * heads) == 0, f"be a multiple of four times the heads ({heads})")
        read.check("hidden_act", read.get("hidden_act", "gelu") == "gelu", "be gelu")
        read.check("multi_modal_projector_bias", not read.flag("multi_modal_projector_bias", False), "be false")
        ratio = read.number("pixel_shuffle_ratio", 0.5)
        shuffle = round(1 / ratio) if ratio > 0 else 0
        fits = shuffle > 0 and math.isclose(ratio * shuffle, 1.0, rel_tol=1e-3) and image // patch % shuffle == 0
        read.check("pixel_shuffle_ratio", fits, f"be 1/n with n dividing the {image // patch} patches of a tile's side")
        adapter = read.integer("projector_output_dim", 4096)
        output = read.integer("vision_output_dim", adapter)
        read.check("vision_output_dim", output == adapter, f"be projector_output_dim ({adapter})")
        inner = read.integer("projector_input_dim", 4096)
        read.check("projector_input_dim", inner == adapter, f"be projector_output_dim ({adapter})")
        return cls(
            image_size=image,
            patch_size=patch,
            num_channels=3,
            hidden_size=hidden,
            intermediate_size=read.integer("intermediate_size", 5632),
            num_hidden_layers=read.integer("num_hidden_layers", 34),
            num_attention_heads=heads,
            rope_theta=_rope_theta(read),
            shuffle=shuffle,
            adapter_size=adapter,
            text_hidden_size=text.integer("hidden_size"),
            patch_token_id=whole.integer("image_token_index", 200092),
        )


def _rope_theta(read: ConfigReader) -> float:
    """RoPE's base, from `rope_parameters` (new spelling) or beside the other keys (old)."""
    return read.section("rope_parameters").number("rope_theta", read.number("rope_theta", 10000.0))
