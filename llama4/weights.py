"""Weights from a Hugging Face checkpoint: read from safetensors files in small blocks, only what the caller owns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama4.config import TextConfig
from llama4.decoder import Decoder
from llama4.moe import Experts
from llama4.vision import VisionEncoder
from llama4.vision_config import VisionConfig

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# Pages of a memory-mapped file count as resident until the file is closed, so it is reopened for every block (0.2 ms).
BLOCK_BYTES = 2 << 20
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_BESIDE_TEXT = ("vision_model.", "multi_modal_projector.")
_ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}

Progress = Callable[[int, int], None]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and, where there is one, the tensor."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a file's header describes it. `name` is the name in the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """The tensors in a directory with one model.safetensors or with shards and an index; opening reads headers only."""

    def __init__(self, path: str | Path) -> None:
        """Raises CheckpointError when a file is missing, truncated or not safetensors, or lacks what the index says."""
        self.path = Path(path)
        index = self.path / INDEX_FILE
        single = self.path / SINGLE_FILE
        self._tensors: dict[str, StoredTensor] = {}
        if index.exists():
            file_of = _read_index(index)
            headers = {name: _read_header(self.path / name) for name in sorted(set(file_of.values()))}
            for name, file in file_of.items():
                if name not in headers[file]:
                    raise CheckpointError(f"{self.path / file} does not hold {name}, which {index} says it does")
                self._tensors[name] = headers[file][name]
        elif single.exists():
            self._tensors = _read_header(single)
        else:
            raise CheckpointError(f"{self.path} holds neither {SINGLE_FILE} nor {INDEX_FILE}")
        nested = any(name.startswith("language_model.") for name in self._tensors)
        self._text_prefix = "language_model." if nested else ""

    def find(self, name: str, shape: Sequence[int]) -> StoredTensor:
        """The tensor of this name (without `language_model.`). Raises CheckpointError if absent or of another shape."""
        stored_name = name if name.startswith(_BESIDE_TEXT) else self._text_prefix + name
        stored = self._tensors.get(stored_name)
        if stored is None:
            raise CheckpointError(f"{self.path} has no tensor {stored_name}")
        if stored.shape != tuple(shape):
            raise CheckpointError(
                f"{stored.name} in {stored.file} has shape {list(stored.shape)}, but config.json asks for {list(shape)}"
            )
        if stored.dtype not in _ITEM_BYTES:
            raise CheckpointError(
                f"{stored.name} in {stored.file} is of type {stored.dtype}; {', '.join(_ITEM_BYTES)} can be read"
            )
        return stored

    def validate(self, config: TextConfig, vision: VisionConfig | None = None) -> None:
        """Checks from the headers that every tensor of the text model, and of the image encoder, is there and fits.

        Raises CheckpointError for the first that is not or does not.
        """
        for name, tensor in Decoder(config, torch.float32, "meta").tensors():
            self.find(name, tensor.shape)
        one_each = Experts(config, {layer: [0] for layer in config.moe_layers}, torch.float32, "meta")
        for name, _, part in one_each.tensors():
            self.find(name, (config.num_local_experts, *part.shape))
        if vision is not None:
            for name, tensor in VisionEncoder(vision, torch.float32, "meta").tensors():
                self.find(name, tensor.shape)


def load_decoder(
    checkpoint: Checkpoint,
    config: TextConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    on_progress: Progress | None = None,
) -> Decoder:
    """The decoder with its weights. `on_progress` gets the checkpoint's bytes that are read, and their total."""
    decoder = Decoder(config, dtype, device)
    _copy(_whole(checkpoint, decoder.tensors()), on_progress)
    return decoder


def load_experts(
    checkpoint: Checkpoint,
    config: TextConfig,
    experts_by_layer: Mapping[int, Sequence[int]],
    dtype: torch.dtype,
    device: torch.device | str,
    on_progress: Progress | None = None,
) -> Experts:
    """These experts with their weights. `on_progress` gets the checkpoint's bytes that are read, and their total."""
    experts = Experts(config, experts_by_layer, dtype, device)
    count = config.num_local_experts
    parts = [_Part(checkpoint.find(name, (count, *to.shape)), n, to) for name, n, to in experts.tensors()]
    _copy(parts, on_progress)
    return experts


def load_vision(
    checkpoint: Checkpoint,
    config: VisionConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    on_progress: Progress | None = None,
) -> VisionEncoder:
    """The image encoder with its weights. `on_progress` gets the checkpoint's bytes that are read, and their total."""
    encoder = VisionEncoder(config, dtype, device)
    _copy(_whole(checkpoint, encoder.tensors()), on_progress)
    return encoder


def _whole(checkpoint: Checkpoint, tensors: Iterable[tuple[str, Tensor]]) -> list[_Part]:
    return [_Part(checkpoint.find(name, tensor.shape), None, tensor) for name, tensor in tensors]


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor, or one `index` of its first dimension, and where it goes."""

    stored: StoredTensor
    index: int | None
    target: Tensor

    @property
    def nbytes(self) -> int:
        return self.target.numel() * _ITEM_BYTES[self.stored.dtype]


def _copy(parts: Sequence[_Part], on_progress: Progress | None) -> None:
    done, total = 0, sum(part.nbytes for part in parts)
    for part in parts:
        rows = part.target.shape[0]
        row_bytes = part.nbytes // rows
        block_rows = max(1, BLOCK_BYTES // row_bytes)
        for first in range(0, rows, block_rows):
            last = min(rows, first + block_rows)
            _copy_rows(part, first, last)
            done += (last - first) * row_bytes
            if on_progress is not None:
                on_progress(done, total)


def _copy_rows(part: _Part, first: int, last: int) -> None:
    try:
        with safe_open(part.stored.file, framework="pt") as file:
            stored = file.get_slice(part.stored.name)
            rows = stored[first:last] if part.index is None else stored[part.index, first:last]
            part.target[first:last].copy_(rows)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{part.stored.name} cannot be read from {part.stored.file}: {error}") from error


def _read_index(file: Path) -> dict[str, str]:
    """Tensor name → file name."""
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(shard) for name, shard in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is not a safetensors index: {error!r}") from error


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file: 8 bytes little-endian header length, JSON header, data."""
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(f"{file} is truncated or not a safetensors file: its header is not complete")
            header = json.loads(stream.read(length))
        end = 8 + length
        cut: list[str] = []
        tensors: dict[str, StoredTensor] = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, stop = entry["data_offsets"]
            tensors[name] = StoredTensor(name, file, entry["dtype"], tuple(entry["shape"]))
            item = _ITEM_BYTES.get(entry["dtype"])
            if item is not None and stop - begin != prod(entry["shape"]) * item:
                raise CheckpointError(f"{name} in {file} has {stop - begin} bytes, unlike its shape {entry['shape']}")
            end = max(end, 8 + length + stop)
            if 8 + length + stop > size:
                cut.append(name)
    except FileNotFoundError:
        raise CheckpointError(f"{file} does not exist") from None
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is not a safetensors file: {error!r}") from error
    if cut:
        raise CheckpointError(f"{file} is truncated: {size} bytes instead of {end}, so that {min(cut)} is incomplete")
    return tensors
