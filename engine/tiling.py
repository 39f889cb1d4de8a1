"""How an image is laid out on tiles: which grid, and how large the image is on it. Pure arithmetic.

Sides are in pixels. A canvas is a grid of square tiles; the image keeps its proportions on it, in the top left corner.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class TileGrid:
    """Rows and columns of tiles that an image is cut into."""

    rows: int
    columns: int

    @property
    def tiles(self) -> int:
        """What the encoder gets: the grid's tiles and, if they are several, the whole image on one more."""
        local = self.rows * self.columns
        return local if local == 1 else local + 1


def best_grid(width: int, height: int, tile_size: int, max_tiles: int) -> TileGrid:
    """The grid on which the image loses least: enlarged as little as possible, else shrunk as little as possible.

    Of several such, the one with fewest tiles. Scales are compared in float32, as the published processing does, so
    that the choice is the same where two are almost equal.
    """
    grids = [TileGrid(n, m) for n in range(1, max_tiles + 1) for m in range(1, max_tiles // n + 1)]
    rows = np.array([grid.rows * tile_size for grid in grids], dtype=np.float32)
    columns = np.array([grid.columns * tile_size for grid in grids], dtype=np.float32)
    scales = np.minimum(rows / np.float32(height), columns / np.float32(width))
    best = scales[scales >= 1].min() if (scales >= 1).any() else scales.max()
    chosen = [grid for grid, scale in zip(grids, scales, strict=True) if scale == best]
    return min(chosen, key=lambda grid: grid.rows * grid.columns)


def fitted_size(width: int, height: int, grid: TileGrid, tile_size: int) -> tuple[int, int]:
    """The image's width and height on the canvas. It is never enlarged beyond a tile's side."""
    room_x = min(max(width, tile_size), grid.columns * tile_size)
    room_y = min(max(height, tile_size), grid.rows * tile_size)
    scale_x, scale_y = room_x / width, room_y / height
    if scale_x < scale_y:
        return room_x, max(1, min(math.floor(height * scale_x), room_y))
    return max(1, min(math.floor(width * scale_y), room_x)), room_y
