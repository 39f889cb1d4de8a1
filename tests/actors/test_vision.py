"""A replica of the image encoder, over the bundled checkpoint, without Ray around it."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from actors import vision
from actors.embeddings import to_tensor
from actors.encoded_images import EncodedImage
from actors.vision import Vision
from actors.vision_app import build_vision
from cluster.config import DeploymentConfig
from engine.image_spec import ImageSpec
from engine.images import ImageLimits, choose_grid, image_digest, image_tokens, read_image
from engine.request import ErrorCode, RequestRejected
from engine.tiles import to_tiles
from llama4.vision_config import VisionConfig
from llama4.weights import Checkpoint, load_vision
from tests.llama4.reference import save_random

TINY = Path(__file__).parents[2] / "checkpoints" / "tiny"
CONFIG = DeploymentConfig.model_validate(
    {"model": {"path": TINY, "dtype": "float32"}, "vision": {"max_batch_tiles": 5, "max_image_pixels": 40_000}}
)


def png(seed: int, width: int, height: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def spec() -> ImageSpec:
    spec = ImageSpec.from_dir(TINY)
    assert spec is not None
    return spec


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """What is in the object store; a reference is an array's number."""
    arrays: list[np.ndarray] = []

    def put(array: np.ndarray) -> int:
        arrays.append(array)
        return len(arrays) - 1

    monkeypatch.setattr(vision.ray, "put", put)
    return arrays


async def test_embeddings_of_many_images_at_once_are_those_of_each_alone(stored, spec):
    """Images of one to ten tiles, through batches of five."""
    replica = Vision(CONFIG)
    files = [png(n, *size) for n, size in enumerate([(56, 56), (170, 56), (60, 111), (168, 160), (20, 200), (10, 10)])]
    digests = [image_digest(data, spec) for data in files]
    answers = await asyncio.gather(*(replica.encode(*pair) for pair in zip(digests, files, strict=True)))
    config = VisionConfig.from_dir(TINY)
    assert config is not None
    encoder = load_vision(Checkpoint(TINY), config, torch.float32, "cpu")
    for data, answer in zip(files, answers, strict=True):
        assert isinstance(answer, EncodedImage)
        image = read_image(data, ImageLimits(10**6, 10**6))
        alone_NMD = encoder(torch.from_numpy(to_tiles(image, spec)))
        found_PD = to_tensor(stored[answer.ref])
        torch.testing.assert_close(found_PD, alone_NMD.flatten(0, 1), rtol=1e-4, atol=1e-5)
        tokens = image_tokens(choose_grid(image.width, image.height, spec), spec)
        assert len(found_PD) == tokens.count(spec.patch_token_id)
        assert answer.nbytes == found_PD.nbytes


async def test_the_same_image_is_encoded_once(stored, spec):
    replica = Vision(CONFIG)
    data = png(1, 100, 50)
    digest = image_digest(data, spec)
    first, second = await asyncio.gather(*(replica.encode(digest, data) for _ in range(2)))
    assert first == second == await replica.encode(digest, data)
    assert len(stored) == 1


async def test_what_cannot_be_read_is_refused_and_disturbs_nobody(stored, spec):
    replica = Vision(CONFIG)
    good, cut, huge = png(1, 60, 60), png(2, 60, 60)[:900], png(3, 201, 200)
    answers = await asyncio.gather(*(replica.encode(image_digest(data, spec), data) for data in (cut, good, huge)))
    assert isinstance(answers[1], EncodedImage)
    for answer, problem in ((answers[0], "truncated"), (answers[2], "at most 40000")):
        assert isinstance(answer, RequestRejected)
        assert (answer.code, answer.field) == (ErrorCode.INVALID_ARGUMENT, "messages")
        assert problem in str(answer)


def test_a_model_without_an_encoder_has_no_deployment(tmp_path):
    save_random(tmp_path, seed=1)
    assert build_vision(DeploymentConfig.model_validate({"model": {"path": tmp_path}})) is None
