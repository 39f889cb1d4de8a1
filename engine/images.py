"""Images of a prompt: reading encoded files, and the tokens that stand for them.

Reading is safe for hostile files: what an image would take is known from its header, and checked, before anything is
decoded. The gateway gets by with the header, and nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image

from engine.image_spec import ImageSpec
from engine.tiling import TileGrid, best_grid

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# Pillow's own limit is one for the whole process, and warns below it; `ImageLimits` come with each call.
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", module=r"PIL\.")  # what is odd in a file is for its sender, not for Herder's log

_ORIENTATION = 0x0112  # EXIF's tag
_UPRIGHT = {  # EXIF's orientation → what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LYING = {5, 6, 7, 8}  # these change width for height


class ImageError(ValueError):
    """An image that is not taken; the message is one sentence for whoever sent it."""


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What is taken: bytes of the encoded file, pixels of the decoded image, and pixels of its longer side."""

    max_bytes: int
    max_pixels: int
    max_side: int = 32_768


@dataclass(frozen=True, slots=True)
class ImageHead:
    """An image's size in pixels, upright."""

    width: int
    height: int


def inspect_image(data: bytes, limits: ImageLimits) -> ImageHead:
    """The size of an encoded image, from its header alone. Raises ImageError when it is not to be taken."""
    image = _open(data, limits)
    width, height = image.size
    return ImageHead(height, width) if _orientation(image) in _LYING else ImageHead(width, height)


def read_image(data: bytes, limits: ImageLimits) -> Image.Image:
    """The image in mode RGB, upright; of an animation the first frame. What is transparent becomes white.

    Takes up to 16 bytes of memory for each pixel on its way. Raises ImageError when the file is not to be taken or
    cannot be read to its end.
    """
    image = _open(data, limits)
    turn = _UPRIGHT.get(_orientation(image))
    try:
        image = _to_rgb(image)
    except Exception as error:  # Pillow's readers raise whatever they stumble over
        raise ImageError("the image cannot be decoded: it is truncated, damaged or of an uncommon kind") from error
    return image if turn is None else image.transpose(turn)


def _open(data: bytes, limits: ImageLimits) -> Image.Image:
    """The image with its header read. Raises ImageError when it is not to be taken."""
    if not data:
        raise ImageError("the image is empty")
    if len(data) > limits.max_bytes:
        raise ImageError(f"the image has {len(data)} bytes, but at most {limits.max_bytes} are taken")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # Pillow's readers raise whatever they stumble over
        raise ImageError(f"the image is not a readable file of one of the formats {', '.join(FORMATS)}") from error
    width, height = image.size
    if max(width, height) > limits.max_side:
        raise ImageError(f"the image has {width} by {height} pixels, but no side may have more than {limits.max_side}")
    if width * height > limits.max_pixels:
        raise ImageError(f"the image has {width} by {height} pixels, but at most {limits.max_pixels} are taken")
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, as far as the header tells; 1, upright, when it tells nothing or nonsense."""
    if image.format == "TIFF":
        return 1  # Pillow turns these itself, and says their size upright
    try:
        # PNG's own getexif would decode the image, to look for EXIF data behind it.
        return int(Image.Image.getexif(image).get(_ORIENTATION, 1))
    except Exception:  # Pillow's readers raise whatever they stumble over
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow's conversion would make everything above 255 white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def image_digest(data: bytes, spec: ImageSpec) -> bytes:
    """16 bytes that name what the encoder makes of an encoded image: BLAKE2b of the file and of how it is processed."""
    processing = repr((spec.tile_size, spec.max_tiles, spec.mean, spec.std))
    return hashlib.blake2b(data, digest_size=16, key=hashlib.blake2b(processing.encode()).digest()).digest()


def choose_grid(width: int, height: int, spec: ImageSpec) -> TileGrid:
    """The grid that an image of this size in pixels, upright, is laid on."""
    return best_grid(width, height, spec.tile_size, spec.max_tiles)


def image_tokens(grid: TileGrid, spec: ImageSpec) -> list[int]:
    """What stands in the prompt for an image on this grid; each patch token has its own embedding, in this order.

    The tiles row by row with separators between columns and after rows, if they are several; then the whole image.
    """
    patches = [spec.patch_token_id] * spec.tokens_per_tile
    ids = [spec.start_token_id]
    if grid.tiles > 1:
        row = [*patches, *[spec.tile_x_token_id, *patches] * (grid.columns - 1), spec.tile_y_token_id]
        ids += row * grid.rows
    return [*ids, spec.image_token_id, *patches, spec.end_token_id]
