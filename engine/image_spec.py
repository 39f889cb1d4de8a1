"""How a checkpoint wants images: number and size of tiles, normalisation, and the tokens that stand for images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, PositiveFloat, PositiveInt, ValidationError

from llama4.vision_config import VisionConfig

_TOKENS = (
    "<|image_start|>",
    "<|image_end|>",
    "<|image|>",
    "<|patch|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
)


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """What images are made into.

    `tile_size`: pixels along a tile's side. `max_tiles`: of an image's grid. `mean` and `std`: for each colour, of
    values between 0 and 1. `tokens_per_tile`: what the encoder makes of a tile. `..._token_id`: the tokens that stand
    for an image, see `images.image_tokens`.
    """

    tile_size: int
    max_tiles: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    tokens_per_tile: int
    start_token_id: int
    end_token_id: int
    image_token_id: int
    patch_token_id: int
    tile_x_token_id: int
    tile_y_token_id: int

    @property
    def token_ids(self) -> frozenset[int]:
        """All tokens that only images consist of."""
        around = {self.start_token_id, self.end_token_id, self.tile_x_token_id, self.tile_y_token_id}
        return frozenset(around | {self.image_token_id, self.patch_token_id})

    @classmethod
    def from_dir(cls, path: str | Path) -> ImageSpec | None:
        """From config.json, tokenizer.json and, where they are, processor_config.json and preprocessor_config.json.

        None when the model takes no images: it has no image encoder, or no tokenizer and so no chats. Raises ValueError
        that names the file when one cannot be used.
        """
        path = Path(path)
        vision = VisionConfig.from_dir(path)
        if vision is None or not (path / "tokenizer.json").is_file():
            return None
        start, end, image, patch, tile_x, tile_y = _token_ids(path / "tokenizer.json", vision)
        processing = _processing(path, vision)
        return cls(
            tile_size=vision.image_size,
            max_tiles=processing.max_patches,
            mean=processing.image_mean,
            std=processing.image_std,
            tokens_per_tile=vision.tokens_per_tile,
            start_token_id=start,
            end_token_id=end,
            image_token_id=image,
            patch_token_id=patch,
            tile_x_token_id=tile_x,
            tile_y_token_id=tile_y,
        )


def _token_ids(file: Path, vision: VisionConfig) -> list[int]:
    """Those of `_TOKENS`."""
    known = {token.content: token.id for token in _read(file, _Tokenizer).added_tokens}
    missing = [name for name in _TOKENS if name not in known]
    if missing:
        raise ValueError(f"{file}: added_tokens lacks {', '.join(missing)}, which images need")
    patch = known["<|patch|>"]
    if patch != vision.patch_token_id:
        raise ValueError(f"{file}: <|patch|> is {patch}, but image_token_index in config.json {vision.patch_token_id}")
    return [known[name] for name in _TOKENS]


def _processing(path: Path, vision: VisionConfig) -> _Processing:
    """Where transformers keeps it: in processor_config.json since its version 5, else in a file of its own."""
    file = path / "processor_config.json"
    processing = _read(file, _Processor).image_processor if file.is_file() else None
    if processing is None:
        file = path / "preprocessor_config.json"
        processing = _read(file, _Processing) if file.is_file() else _Processing()
    size = processing.size
    if size is not None and not size.height == size.width == vision.image_size:
        raise ValueError(f"{file}: size is {size.height} by {size.width}, but a tile has {vision.image_size} pixels")
    return processing


class _AddedToken(BaseModel):
    id: int
    content: str


class _Tokenizer(BaseModel):
    """tokenizer.json, under its own names."""

    added_tokens: tuple[_AddedToken, ...] = ()


class _Size(BaseModel):
    height: PositiveInt
    width: PositiveInt


class _Processing(BaseModel):
    """preprocessor_config.json, under its own names. Of what Herder does in one way only, no other value is taken."""

    size: _Size | None = None
    max_patches: PositiveInt = 16
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.5, 0.5, 0.5)
    resample: Literal[2] = 2  # bilinear
    resize_to_max_canvas: Literal[False] = False


class _Processor(BaseModel):
    """processor_config.json, under its own names."""

    image_processor: _Processing | None = None


_File = TypeVar("_File", _Tokenizer, _Processor, _Processing)


def _read(file: Path, kind: type[_File]) -> _File:
    try:
        return kind.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
