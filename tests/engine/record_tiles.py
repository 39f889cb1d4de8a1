"""Records what transformers' Llama 4 processor makes of images of many sizes, modes and formats.

It needs torchvision, which imports only beside a torch of its own release, so it runs in an environment of its own:

    python -m venv /tmp/recorder && /tmp/recorder/bin/pip install torch torchvision transformers
    /tmp/recorder/bin/python tests/engine/record_tiles.py tests/engine/fixtures_images/tiles.npz

The fixture in the repository: torch 2.14.1, torchvision 0.29.1, transformers 5.23.0, Pillow 13.0.0, on a CPU with AVX2.
It holds

- `files`: the encoded images, one behind the other;
- `tiles`: all pixel values, as the bits of bfloat16;
- `cases`: a JSON list with each image's name, size of its file, most tiles, number of tiles, and tokens;
- `layouts`: a row for each of many sizes of an image: width, height, most tiles, rows and columns of the grid, and
  width and height on it.

Shapes: H and W an image's sides, C colours.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, TiffImagePlugin
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.image_utils import SizeDict
from transformers.models.llama4.image_processing_llama4 import (
    Llama4ImageProcessor,
    find_supported_resolutions,
    get_best_fit,
    get_max_res_without_distortion,
)
from transformers.models.llama4.processing_llama4 import Llama4Processor

TILE_SIZE = 28
PATCH_SIZE = 7
TOKENS = ["image_start", "image_end", "image", "patch", "tile_x_separator", "tile_y_separator"]
SIZES = [(28, 28), (1, 1), (20, 11), (29, 29), (56, 28), (57, 28), (28, 57), (100, 100), (150, 97), (97, 150)]
SIZES += [(230, 30), (30, 230), (448, 28), (28, 449), (300, 220), (1, 40), (40, 1), (1, 700), (500, 3), (123, 122)]
Case = tuple[str, bytes, int]


def painted(width: int, height: int) -> Image.Image:
    """Colours that change slowly, quickly and suddenly."""
    y_HW, x_HW = np.mgrid[:height, :width]
    check_HW = (x_HW // 3 + y_HW // 2) % 2 * 180 + 40
    pixels_HWC = np.stack([x_HW * 255 // width, 255 - y_HW * 255 // height, check_HW], axis=2)
    return Image.fromarray(pixels_HWC.astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def cases() -> Iterator[Case]:
    """Name, file and most tiles."""
    for width, height in SIZES:
        yield f"{width}x{height}", encoded(painted(width, height), "PNG"), 16
    for most in (1, 2, 5):
        yield f"max {most}", encoded(painted(140, 90), "PNG"), most
    image = painted(40, 31)
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, 40, dtype=np.uint8), (31, 1)))
    with_alpha, grey = image.copy(), image.convert("L")
    with_alpha.putalpha(alpha)
    palette = image.quantize(16)
    yield "L", encoded(grey, "PNG"), 16
    yield "L transparent", encoded(grey, "PNG", transparency=grey.getpixel((5, 5))), 16
    yield "LA", encoded(with_alpha.convert("LA"), "PNG"), 16
    yield "1", encoded(image.convert("1"), "PNG"), 16
    yield "RGBA", encoded(with_alpha, "PNG"), 16
    yield "RGB transparent", encoded(image, "PNG", transparency=image.getpixel((5, 5))), 16
    yield "P", encoded(palette, "PNG"), 16
    yield "P transparent", encoded(palette, "PNG", transparency=bytes(range(0, 256, 16))), 16
    yield "I", encoded(grey.convert("I"), "TIFF"), 16
    yield "F", encoded(grey.convert("F"), "TIFF"), 16
    yield "CMYK TIFF", encoded(image.convert("CMYK"), "TIFF"), 16
    yield "CMYK JPEG", encoded(image.convert("CMYK"), "JPEG"), 16
    yield "JPEG", encoded(image, "JPEG"), 16
    yield "JPEG progressive", encoded(image, "JPEG", progressive=True), 16
    yield "JPEG grey", encoded(grey, "JPEG"), 16
    yield "BMP", encoded(image, "BMP"), 16
    yield "BMP palette", encoded(palette, "BMP"), 16
    yield "TIFF LZW", encoded(image, "TIFF", compression="tiff_lzw"), 16
    yield "TIFF alpha", encoded(with_alpha, "TIFF"), 16
    yield "WEBP", encoded(image, "WEBP"), 16
    yield "WEBP lossless alpha", encoded(with_alpha, "WEBP", lossless=True), 16
    later = [image.transpose(Image.Transpose.ROTATE_180), ImageOps.invert(image)]
    yield "GIF", encoded(palette, "GIF"), 16
    yield "GIF animated", encoded(palette, "GIF", save_all=True, append_images=later), 16
    yield "GIF animated transparent", encoded(with_alpha, "GIF", save_all=True, append_images=later), 16
    yield "WEBP animated", encoded(image, "WEBP", save_all=True, append_images=later, lossless=True), 16
    yield "PNG animated", encoded(image, "PNG", save_all=True, append_images=later), 16
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield f"JPEG turned {orientation}", encoded(image, "JPEG", exif=exif), 16
        yield f"PNG turned {orientation}", encoded(image, "PNG", exif=exif), 16
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[0x0112] = orientation
        yield f"TIFF turned {orientation}", encoded(image, "TIFF", tiffinfo=tags), 16
    exif[0x0112] = 6
    yield "WEBP turned 6", encoded(image, "WEBP", exif=exif), 16


def processor(most_tiles: int) -> Llama4Processor:
    vocabulary = {f"<|{name}|>": token_id for token_id, name in enumerate(TOKENS)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<|image|>"))
    backend.add_special_tokens(list(vocabulary))
    size = {"height": TILE_SIZE, "width": TILE_SIZE}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    images = Llama4ImageProcessor(size=size, max_patches=most_tiles)
    return Llama4Processor(images, tokenizer, patch_size=PATCH_SIZE)


def layout(width: int, height: int, most_tiles: int) -> list[int]:
    """A row of `layouts`, for tiles of the published size."""
    size = SizeDict(height=336, width=336)
    canvases = torch.tensor(find_supported_resolutions(most_tiles, size))
    canvas_height, canvas_width = get_best_fit((height, width), canvases).tolist()
    room = min(max(height, 336), canvas_height), min(max(width, 336), canvas_width)
    fitted_height, fitted_width = get_max_res_without_distortion((height, width), room)
    grid = [canvas_height // 336, canvas_width // 336]
    return [width, height, most_tiles, *grid, max(fitted_width, 1), max(fitted_height, 1)]


def main() -> None:
    files, tiles, table = [], [], []
    rng = np.random.default_rng(1)
    sizes = [*rng.integers(1, 8000, (300, 2)).tolist(), *rng.integers(1, 700, (300, 2)).tolist()]
    rows = [layout(width, height, (16, 16, 7, 4)[n % 4]) for n, (width, height) in enumerate(sizes)]
    for name, data, most_tiles in cases():
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        output = processor(most_tiles)(images=[image], text="<|image|>", return_tensors="pt")
        bits: NDArray[np.uint16] = output["pixel_values"].to(torch.bfloat16).view(torch.uint16).numpy()
        files.append(np.frombuffer(data, np.uint8))
        tiles.append(bits.ravel())
        row = {"name": name, "bytes": len(data), "max_tiles": most_tiles, "tiles": len(bits)}
        table.append({**row, "tokens": output["input_ids"][0].tolist()})
    np.savez_compressed(
        sys.argv[1],
        files=np.concatenate(files),
        tiles=np.concatenate(tiles),
        cases=np.frombuffer(json.dumps(table).encode(), np.uint8),
        layouts=np.array(rows, np.uint16),
    )


if __name__ == "__main__":
    main()
