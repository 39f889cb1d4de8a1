"""How checkpoints want images, and files that do not say it well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.image_spec import ImageSpec

TOKENS = ("image_start", "image_end", "image", "patch", "tile_x_separator", "tile_y_separator")


def checkpoint(path: Path, *, preprocessor: object = None, tokens: tuple[str, ...] = TOKENS, patch: int = 13) -> Path:
    vision = {"image_size": 28, "patch_size": 7, "hidden_size": 16, "num_attention_heads": 2}
    config = {"text_config": {"hidden_size": 16}, "vision_config": vision, "image_token_index": patch}
    (path / "config.json").write_text(json.dumps(config))
    added = [{"id": 10 + n, "content": f"<|{name}|>", "special": True} for n, name in enumerate(tokens)]
    (path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    if preprocessor is not None:
        (path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return path


def test_spec_of_a_checkpoint(tmp_path: Path) -> None:
    spec = ImageSpec.from_dir(checkpoint(tmp_path))
    assert spec == ImageSpec(28, 16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 4, 10, 11, 12, 13, 14, 15)
    wishes = {
        "size": {"height": 28, "width": 28},
        "max_patches": 4,
        "image_mean": [0, 0.1, 0.2],
        "image_std": [1, 2, 3],
    }
    spec = ImageSpec.from_dir(checkpoint(tmp_path, preprocessor={**wishes, "resample": 2, "do_resize": True}))
    assert spec is not None and (spec.max_tiles, spec.mean, spec.std) == (4, (0.0, 0.1, 0.2), (1.0, 2.0, 3.0))


def test_processor_config_goes_first(tmp_path: Path) -> None:
    checkpoint(tmp_path, preprocessor={"max_patches": 4})
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_token": "<|image|>"}))
    spec = ImageSpec.from_dir(tmp_path)
    assert spec is not None and spec.max_tiles == 4
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"max_patches": 5}}))
    spec = ImageSpec.from_dir(tmp_path)
    assert spec is not None and spec.max_tiles == 5


def test_no_encoder_or_no_tokenizer_no_images(tmp_path: Path) -> None:
    (checkpoint(tmp_path) / "tokenizer.json").unlink()
    assert ImageSpec.from_dir(tmp_path) is None
    checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"hidden_size": 16}}))
    assert ImageSpec.from_dir(tmp_path) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokens": TOKENS[:4]}, r"added_tokens lacks <\|tile_x_separator\|>, <\|tile_y_separator\|>"),
        ({"patch": 7}, r"<\|patch\|> is 13, but image_token_index in config.json 7"),
        ({"preprocessor": {"size": {"height": 28, "width": 56}}}, "size is 28 by 56, but a tile has 28 pixels"),
        ({"preprocessor": {"max_patches": 0}}, "preprocessor_config.json: max_patches: "),
        ({"preprocessor": {"image_std": [1, 1, 0]}}, "preprocessor_config.json: image_std.2: "),
        ({"preprocessor": {"resize_to_max_canvas": True}}, "preprocessor_config.json: resize_to_max_canvas: "),
        ({"preprocessor": []}, "preprocessor_config.json: "),
    ],
)
def test_wishes_that_cannot_be_met(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ImageSpec.from_dir(checkpoint(tmp_path, **options))
