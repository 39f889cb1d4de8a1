"""The image encoder, and whole prompts with images, against transformers' Llama 4."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama4.config import TextConfig
from llama4.kv_pages import Batch, InputRows, KVPages, Segment
from llama4.vision import VisionEncoder
from llama4.vision_config import VisionConfig
from llama4.weights import Checkpoint, CheckpointError, load_decoder, load_experts, load_vision
from tests.llama4.reference import PATCH_TOKEN, reference_embeddings, reference_logits, save_random
from tests.llama4.runner import HereDispatcher

TOLERANCE = 1e-4
PLAIN = {"image_size": 40, "patch_size": 1, "pixel_shuffle_ratio": 1.0, "intermediate_size": 16}  # 1,600 tokens a tile
few = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, object]:
    shuffle = draw(st.sampled_from([1, 2, 4]))
    patch = draw(st.sampled_from([1, 2, 7, 14]))
    heads = draw(st.integers(1, 3))
    width = heads * draw(st.sampled_from([4, 8, 12]))
    adapter = draw(st.sampled_from([8, 20]))
    return {
        "image_size": patch * shuffle * draw(st.integers(1, 3)),
        "patch_size": patch,
        "pixel_shuffle_ratio": 1 / shuffle,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "intermediate_size": width * shuffle**2,  # the adapter's input in transformers
        "projector_input_dim": adapter,
        "projector_output_dim": adapter,
        "vision_output_dim": adapter,
        "rope_parameters": {"rope_type": "default", "rope_theta": draw(st.sampled_from([10.0, 10000.0]))},
    }


def load(path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[VisionConfig, VisionEncoder]:
    config = VisionConfig.from_dir(path)
    assert config is not None
    return config, load_vision(Checkpoint(path), config, dtype, "cpu")


def random_tiles(config: VisionConfig, tiles: int, seed: int) -> Tensor:
    shape = (tiles, config.num_channels, config.image_size, config.image_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@few
@given(vision=shapes(), seed=st.integers(0, 99), tiles=st.integers(1, 3), width=st.sampled_from([16, 24]))
def test_encoder_matches_transformers(vision: dict[str, object], seed: int, tiles: int, width: int) -> None:
    with tempfile.TemporaryDirectory() as path:
        save_random(path, seed=seed, conditional=True, vision=vision, hidden_size=width, num_hidden_layers=1)
        config, encoder = load(path)
        tiles_NCHW = random_tiles(config, tiles, seed)
        expected_NMD = reference_embeddings(path, tiles_NCHW)
        embeddings_NMD = encoder(tiles_NCHW)
    assert embeddings_NMD.shape == (tiles, config.tokens_per_tile, width)
    torch.testing.assert_close(embeddings_NMD, expected_NMD, atol=TOLERANCE, rtol=TOLERANCE)


def test_plain_shape(tmp_path: Path) -> None:
    save_random(tmp_path, seed=1, conditional=True, vision=PLAIN)
    config, encoder = load(tmp_path)
    assert config.tokens_per_tile == 1600
    tiles_NCHW = random_tiles(config, 1, 1)
    expected_NMD = reference_embeddings(tmp_path, tiles_NCHW)
    torch.testing.assert_close(encoder(tiles_NCHW), expected_NMD, atol=TOLERANCE, rtol=TOLERANCE)


def run(path: str | Path, token_ids: Sequence[int], embeddings_PD: Tensor, cuts: Sequence[int]) -> Tensor:
    """The prompt's logits [T, V], computed in the steps that `cuts` make of it."""
    config = TextConfig.from_dir(path)
    checkpoint = Checkpoint(path)
    decoder = load_decoder(checkpoint, config, torch.float32, "cpu")
    every = {layer: range(config.num_local_experts) for layer in config.moe_layers}
    dispatcher = HereDispatcher(load_experts(checkpoint, config, every, torch.float32, "cpu"))
    page_size = 4
    pages = range(len(token_ids) // page_size + 1)
    kv = KVPages(config, page_size, {"full": len(pages), "chunked": len(pages)}, torch.float32, "cpu")
    row_of = {position: row for row, position in enumerate(n for n, i in enumerate(token_ids) if i == PATCH_TOKEN)}
    parts = []
    for first, last in itertools.pairwise([0, *cuts, len(token_ids)]):
        needed = pages[: -(-last // page_size)]
        segment = Segment(0, last - first, first, {"full": needed, "chunked": needed})
        places = [n for n in range(first, last) if n in row_of]
        images = InputRows(torch.tensor([n - first for n in places]), embeddings_PD[[row_of[n] for n in places]])
        batch = Batch.of(token_ids[first:last], [segment], images if places else None)
        parts.append(decoder.logits(decoder(batch, kv, dispatcher)))
    return torch.cat(parts)


@few
@given(
    tiles_of=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    seed=st.integers(0, 99),
    cuts=st.sets(st.integers(1, 12)),
)
def test_whole_model_matches_transformers(tiles_of: list[int], seed: int, cuts: set[int]) -> None:
    """Images of one or several tiles with text before, between and behind, prefilled whole and in chunks."""
    vision = {"image_size": 8, "patch_size": 2, "num_hidden_layers": 2}
    with tempfile.TemporaryDirectory() as path:
        save_random(path, seed=seed, conditional=True, vision=vision)
        config, encoder = load(path)
        token_ids = [1, 2]
        for tiles in tiles_of:
            token_ids += [3, *[4, *[PATCH_TOKEN] * config.tokens_per_tile] * tiles, 5]
        tiles_NCHW = random_tiles(config, sum(tiles_of), seed)
        expected_TV = reference_logits(path, token_ids, tiles_NCHW)
        logits_TV = run(path, token_ids, encoder(tiles_NCHW).flatten(0, 1), sorted(cuts & set(range(len(token_ids)))))
    torch.testing.assert_close(logits_TV, expected_TV, atol=TOLERANCE, rtol=TOLERANCE)


def test_bfloat16_stays_close(tmp_path: Path) -> None:
    save_random(tmp_path, seed=2, conditional=True)
    config, encoder = load(tmp_path, torch.bfloat16)
    tiles_NCHW = random_tiles(config, 2, 2)
    embeddings_NMD = encoder(tiles_NCHW)
    assert embeddings_NMD.dtype is torch.bfloat16
    torch.testing.assert_close(embeddings_NMD.float(), reference_embeddings(tmp_path, tiles_NCHW), atol=0.1, rtol=0.1)


def test_loading_reads_vision_tensors_only(tmp_path: Path) -> None:
    save_random(tmp_path, seed=3, conditional=True)
    config, encoder = load(tmp_path)
    calls: list[tuple[int, int]] = []
    load_vision(Checkpoint(tmp_path), config, torch.float32, "cpu", lambda done, total: calls.append((done, total)))
    size = sum(tensor.nbytes for _, tensor in encoder.tensors())
    stored = load_file(tmp_path / "model.safetensors")
    beside_text = {name: tensor for name, tensor in stored.items() if not name.startswith("language_model.")}
    assert calls[-1] == (size, size) and size == sum(tensor.nbytes for tensor in beside_text.values())
    assert {name for name, _ in encoder.tensors()} == set(beside_text)


def test_validation_covers_the_encoder(tmp_path: Path) -> None:
    text = save_random(tmp_path, seed=4, conditional=True)
    vision = VisionConfig.from_dir(tmp_path)
    Checkpoint(tmp_path).validate(text, vision)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "vision_model.model.layers.0.mlp.fc1.bias"
    save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / "model.safetensors")
    Checkpoint(tmp_path).validate(text)
    with pytest.raises(CheckpointError, match=f"has no tensor {name}"):
        Checkpoint(tmp_path).validate(text, vision)


def test_config_of_published_shape() -> None:
    scout = {
        "text_config": {"hidden_size": 5120},
        "image_token_index": 200092,
        "vision_config": {
            "hidden_size": 1408,
            "image_size": 336,
            "intermediate_size": 5632,
            "norm_eps": 1e-05,
            "num_attention_heads": 16,
            "num_channels": 3,
            "num_hidden_layers": 34,
            "patch_size": 14,
            "pixel_shuffle_ratio": 0.5,
            "projector_input_dim": 4096,
            "projector_output_dim": 4096,
            "rope_theta": 10000,
            "vision_output_dim": 4096,
        },
    }
    config = VisionConfig.from_dict(scout)
    assert config is not None and config.tokens_per_tile == 144 and config.rope_theta == 10000
    shapes = {name: tuple(tensor.shape) for name, tensor in VisionEncoder(config, torch.bfloat16, "meta").tensors()}
    assert shapes["vision_model.positional_embedding_vlm"] == (577, 1408)
    assert shapes["vision_model.vision_adapter.mlp.fc1.weight"] == (4096, 5632)
    assert shapes["multi_modal_projector.linear_1.weight"] == (5120, 4096)


def test_no_encoder(tmp_path: Path) -> None:
    save_random(tmp_path, seed=5)
    assert VisionConfig.from_dir(tmp_path) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 30}, "image_size must be a multiple of patch_size (14), not 30"),
        ({"patch_size": [14, 14]}, "patch_size must be a positive whole number, not [14, 14]"),
        ({"num_channels": 1}, "num_channels must be 3, not 1"),
        ({"hidden_size": 18}, "hidden_size must be a multiple of four times the heads (2), not 18"),
        ({"pixel_shuffle_ratio": 0.7}, "pixel_shuffle_ratio must be 1/n with n dividing the 2 patches"),
        ({"pixel_shuffle_ratio": 0.25}, "pixel_shuffle_ratio must be 1/n with n dividing the 2 patches"),
        ({"pixel_shuffle_ratio": 0}, "pixel_shuffle_ratio must be 1/n with n dividing the 2 patches"),
        ({"hidden_act": "relu"}, "hidden_act must be gelu, not 'relu'"),
        ({"projector_input_dim": 8}, "projector_input_dim must be projector_output_dim (16), not 8"),
        ({"vision_output_dim": 8}, "vision_output_dim must be projector_output_dim (16), not 8"),
        ({"num_attention_heads": None}, "num_attention_heads is missing"),
    ],
)
def test_config_errors(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    save_random(tmp_path, seed=6, conditional=True)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    values["vision_config"] |= changes
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError) as error:
        VisionConfig.from_dir(tmp_path)
    assert f"{file}: vision_config: {words}" in str(error.value)
