"""Images: tiles and tokens against what transformers' processor gave (`record_tiles.py`), and hostile files.

Shapes: N tiles of an image, C colours, H and W a tile's sides.
"""

from __future__ import annotations

import io
import json
import struct
import warnings
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFile

from engine.image_spec import ImageSpec
from engine.images import (
    ImageError,
    ImageHead,
    ImageLimits,
    choose_grid,
    image_digest,
    image_tokens,
    inspect_image,
    read_image,
)
from engine.tiles import to_tiles
from engine.tiling import TileGrid, best_grid, fitted_size

TOLERANCE = 1e-3
LIMITS = ImageLimits(max_bytes=1 << 20, max_pixels=1 << 20)
SPEC = ImageSpec(
    tile_size=28,
    max_tiles=16,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    tokens_per_tile=4,
    start_token_id=0,
    end_token_id=1,
    image_token_id=2,
    patch_token_id=3,
    tile_x_token_id=4,
    tile_y_token_id=5,
)


@dataclass(frozen=True)
class Recorded:
    name: str
    data: bytes
    max_tiles: int
    tiles_NCHW: NDArray[np.float32]
    tokens: list[int]


def recorded() -> tuple[list[Recorded], list[list[int]]]:
    """The images, and the layouts."""
    fixture = np.load(Path(__file__).parent / "fixtures_images" / "tiles.npz")
    files, bits = fixture["files"].tobytes(), fixture["tiles"]
    images = []
    for case in json.loads(fixture["cases"].tobytes()):
        count = case["tiles"] * 3 * SPEC.tile_size**2
        values = (bits[:count].astype(np.uint32) << 16).view(np.float32)
        tiles_NCHW = values.reshape(-1, 3, SPEC.tile_size, SPEC.tile_size)
        images.append(Recorded(case["name"], files[: case["bytes"]], case["max_tiles"], tiles_NCHW, case["tokens"]))
        files, bits = files[case["bytes"] :], bits[count:]
    return images, fixture["layouts"].tolist()


IMAGES, LAYOUTS = recorded()


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.name)
def test_tiles_and_tokens_match_transformers(image: Recorded) -> None:
    spec = replace(SPEC, max_tiles=image.max_tiles)
    tiles_NCHW = to_tiles(read_image(image.data, LIMITS), spec)
    assert tiles_NCHW.dtype == np.float32 and tiles_NCHW.shape == image.tiles_NCHW.shape
    np.testing.assert_allclose(tiles_NCHW, image.tiles_NCHW, atol=TOLERANCE, rtol=0)
    head = inspect_image(image.data, LIMITS)
    assert image_tokens(choose_grid(head.width, head.height, spec), spec) == image.tokens


def test_layouts_match_transformers() -> None:
    for width, height, max_tiles, rows, columns, *fitted in LAYOUTS:
        grid = best_grid(width, height, 336, max_tiles)
        assert (grid, fitted_size(width, height, grid, 336)) == (TileGrid(rows, columns), tuple(fitted)), (
            width,
            height,
        )


@given(width=st.integers(1, 40_000), height=st.integers(1, 40_000), max_tiles=st.integers(1, 20))
def test_an_image_lies_on_its_grid(width: int, height: int, max_tiles: int) -> None:
    grid = best_grid(width, height, 28, max_tiles)
    fitted_width, fitted_height = fitted_size(width, height, grid, 28)
    assert 1 <= grid.rows * grid.columns <= max_tiles
    assert 1 <= fitted_width <= 28 * grid.columns and 1 <= fitted_height <= 28 * grid.rows
    assert fitted_width <= max(width, 28) and fitted_height <= max(height, 28)


@settings(deadline=None)
@given(width=st.integers(1, 120), height=st.integers(1, 120), tokens_per_tile=st.integers(1, 9))
def test_every_patch_token_has_a_row(width: int, height: int, tokens_per_tile: int) -> None:
    spec = replace(SPEC, tokens_per_tile=tokens_per_tile)
    grid = choose_grid(width, height, spec)
    tokens = image_tokens(grid, spec)
    assert tokens.count(spec.patch_token_id) == grid.tiles * tokens_per_tile
    assert len(to_tiles(Image.new("RGB", (width, height)), spec)) == grid.tiles
    assert (tokens[0], tokens[-1]) == (spec.start_token_id, spec.end_token_id) and set(tokens) <= spec.token_ids


def test_normalisation_is_the_checkpoints() -> None:
    spec = replace(SPEC, mean=(0.0, 0.5, 0.25), std=(1.0, 0.5, 0.25))
    tiles_NCHW = to_tiles(Image.new("RGB", (28, 28), (255, 0, 64)), spec)
    np.testing.assert_allclose(tiles_NCHW[0, :, 5, 5], [1.0, -1.0, 64 / 255 * 4 - 1], atol=0.01)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey_become_eight(kind: str) -> None:
    """transformers takes Pillow's conversion, in which everything above 255 of 65535 is white."""
    levels = np.arange(40 * 40, dtype=np.uint16).reshape(40, 40) * 40
    image = read_image(encoded(Image.fromarray(levels), kind), LIMITS)
    assert (np.asarray(image) == (levels >> 8)[:, :, None]).all()


def test_exif_behind_a_png_s_pixels_is_not_looked_for() -> None:
    """The size must be known from the header, and the same when the image is read."""
    png = encoded(Image.new("RGB", (40, 20)), "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    late = png[:-12] + chunk(b"eXIf", exif.tobytes()[6:]) + png[-12:]
    assert inspect_image(late, LIMITS) == ImageHead(40, 20) and read_image(late, LIMITS).size == (40, 20)


def test_digest_names_file_and_processing() -> None:
    digest = image_digest(b"one", SPEC)
    assert len(digest) == 16 and digest == image_digest(b"one", replace(SPEC, patch_token_id=9))
    others = [image_digest(b"two", SPEC), image_digest(b"one", replace(SPEC, tile_size=56))]
    others += [image_digest(b"one", replace(SPEC, max_tiles=4)), image_digest(b"one", replace(SPEC, mean=(0, 0, 0)))]
    assert len({digest, *others}) == 5


# Hostile files


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, *more: bytes) -> bytes:
    """A PNG that says it has this size, and has no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join([chunk(b"IHDR", header), *more, chunk(b"IDAT", zlib.compress(b""))])


def bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6)


def gif(screen: tuple[int, int], frame: tuple[int, int]) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", *screen, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x08"


def jpeg(width: int, height: int) -> bytes:
    small = encoded(Image.new("RGB", (8, 8)), "JPEG")
    place = small.index(b"\xff\xc0") + 5
    return small[:place] + struct.pack(">HH", height, width) + small[place + 4 :]


def webp(width: int, height: int) -> bytes:
    frame = encoded(Image.new("RGB", (8, 8)), "WEBP", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")])
    place = frame.index(b"VP8X") + 12
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return frame[:place] + size + frame[place + 6 :]


def tiff(width: int, height: int) -> bytes:
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    tags += [(277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, width * height % 2**32)]
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)


BOMBS = {
    "PNG": png(100_000, 100_000),
    "BMP": bmp(100_000, 100_000),
    "GIF": gif((65_535, 65_535), (65_535, 65_535)),
    "GIF whose frame is larger than its screen": gif((10, 10), (60_000, 60_000)),
    "JPEG": jpeg(65_500, 65_500),
    "WEBP": webp(16_383, 16_383),
    "TIFF": tiff(100_000, 100_000),
    "within the sides": png(30_000, 30_000),
    "one long line": png(1, 100_000),
    "one long column": png(100_000, 1),
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_bombs_are_refused_by_their_headers(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("an image was decoded"))
    for take in (inspect_image, read_image):
        with warnings.catch_warnings(), pytest.raises(ImageError, match=r"the image has \d+ by \d+ pixels, but"):
            warnings.simplefilter("error")
            take(data, LIMITS)


def test_a_large_image_within_limits_gives_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inspect_image(png(16_000, 16_000), ImageLimits(1 << 20, 1 << 30)) == ImageHead(16_000, 16_000)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the image is empty"),
        (bytes((1 << 20) + 1), "has 1048577 bytes, but at most 1048576 are taken"),
        (b"hello", "not a readable file of one of the formats PNG, JPEG, WEBP, GIF, BMP, TIFF"),
        (bytes(5000), "not a readable file of one of the formats"),
        (
            b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
            "not a readable file of one of the formats",
        ),
        (b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj", "not a readable file of one of the formats"),
        (encoded(Image.new("RGB", (9, 9)), "PDF"), "not a readable file of one of the formats"),
        (encoded(Image.new("RGB", (9, 9)), "PPM"), "not a readable file of one of the formats"),
        (encoded(Image.new("RGB", (9, 9)), "ICO"), "not a readable file of one of the formats"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a readable file of one of the formats"),
        (png(9, 9, chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(50 << 20)))), "not a readable file of one of"),
        (png(0, 9), "not a readable file of one of the formats"),
    ],
)
def test_what_is_no_image_is_refused(data: bytes, words: str) -> None:
    for take in (inspect_image, read_image):
        with pytest.raises(ImageError, match=words):
            take(data, LIMITS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_images_are_refused(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 255, (60, 60, 3), np.uint8))
    data = encoded(noise, kind)
    for part in (0.3, 0.6, 0.9):
        with pytest.raises(ImageError):
            read_image(data[: int(len(data) * part)], LIMITS)


@pytest.mark.filterwarnings("ignore::UserWarning")  # pytest puts its own filters in place of those of engine.images
@settings(max_examples=300, deadline=None)
@given(
    image=st.sampled_from(IMAGES), end=st.integers(0, 6000), changes=st.dictionaries(st.integers(0, 6000), st.binary())
)
@example(image=IMAGES[0], end=0, changes={})
def test_damaged_files_give_an_image_or_an_image_error(image: Recorded, end: int, changes: dict[int, bytes]) -> None:
    data = bytearray(image.data[:end])
    for place, new in changes.items():
        data[place : place + len(new)] = new
    try:
        head = inspect_image(bytes(data), LIMITS)
        read = read_image(bytes(data), LIMITS)
    except ImageError:
        return
    assert read.mode == "RGB" and read.size == (head.width, head.height)
    to_tiles(read, SPEC)
