"""From an image to the tiles that the encoder takes.

The processing is Llama 4's as published: the image is laid on a grid of square tiles (see `tiling`), and all of it once
more on a tile of its own.

Shapes: N tiles of an image, C = 3 colours, H and W a tile's sides, V = 256 values of a pixel.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from engine.image_spec import ImageSpec
from engine.images import choose_grid
from engine.tiling import fitted_size


def to_tiles(image: Image.Image, spec: ImageSpec) -> NDArray[np.float32]:
    """An RGB image's tiles_NCHW, normalised: row by row and, if they are several, the whole image on the last."""
    side = spec.tile_size
    grid = choose_grid(image.width, image.height, spec)
    width, height = fitted_size(image.width, image.height, grid, side)
    pixels_CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    canvas_CHW = torch.zeros((3, grid.rows * side, grid.columns * side), dtype=torch.uint8)
    canvas_CHW[:, :height, :width] = _resize(pixels_CHW, width, height)
    by_tile = canvas_CHW.view(3, grid.rows, side, grid.columns, side).permute(1, 3, 0, 2, 4)
    tiles_NCHW = by_tile.reshape(-1, 3, side, side)
    if grid.tiles > 1:
        tiles_NCHW = torch.cat([tiles_NCHW, _resize(pixels_CHW, side, side)[None]])
    levels_CV = _levels(spec.mean, spec.std)
    normalised: NDArray[np.float32] = levels_CV[np.arange(3)[:, None, None], tiles_NCHW.numpy()]
    return normalised


def _resize(pixels_CHW: Tensor, width: int, height: int) -> Tensor:
    """Bilinear with antialiasing, on bytes: what torchvision does, which the published processing uses."""
    resized_1CHW = F.interpolate(pixels_CHW[None], (height, width), mode="bilinear", antialias=True)
    return resized_1CHW[0]


@functools.lru_cache
def _levels(mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """What each value of a pixel is normalised to, [C, V]; rounded to bfloat16, as the published processing is."""
    values_V = torch.arange(256).to(torch.bfloat16) * (1 / 255)
    mean_C1, std_C1 = (torch.tensor(numbers, dtype=torch.bfloat16)[:, None] for numbers in (mean, std))
    levels: NDArray[np.float32] = ((values_V - mean_C1) / std_C1).float().numpy()
    return levels
