"""Products of a few rows with many, in tiles whose sums the registers can hold: compiled, on one thread.

Addresses and strides count bytes; rows of float32 may have any width.
"""

from __future__ import annotations

from typing import Any

from numba import carray, literally, njit

from llama4.emitter import LANES, STEP
from llama4.intrinsics import CACHE, LARGE, MEDIUM, PANEL, SMALL, floats_at
from llama4.product_tiles import BLOCK, add_weighted, dot_tile, panel_tile

FLOAT, INT = 4, 8  # bytes
LINE = STEP * FLOAT  # of a cache
_AHEAD = 1024 * FLOAT  # of a lone stream that is on its way; processors fetch it ahead by themselves, if not far enough


@njit(cache=CACHE)
def dots(
    rows: Any, x: Any, x_stride: Any, columns: Any, w: Any, w_stride: Any, y: Any, y_stride: Any, width: Any
) -> None:
    """y[r, c] = x[r] . w[c]: rows at x and w, one every stride; y[r, c] at y + r * y_stride + c * FLOAT."""
    if rows < 4:  # memory is the limit, and read fastest as one stream
        for c in range(columns):
            w_c, y_c = w + c * w_stride, y + c * FLOAT
            if rows == 1:
                dot_tile(1, 1, x, x_stride, w_c, w_stride, y_c, y_stride, width, w_c + _AHEAD, LINE)
            elif rows == 2:
                dot_tile(2, 1, x, x_stride, w_c, w_stride, y_c, y_stride, width, w_c + _AHEAD, LINE)
            elif rows == 3:
                dot_tile(3, 1, x, x_stride, w_c, w_stride, y_c, y_stride, width, w_c + _AHEAD, LINE)
        return
    whole = rows - rows % 4
    rest_x, rest_y = x + whole * x_stride, whole * y_stride
    # Several streams are not fetched ahead by processors: the next three rows are, a part by each tile of these three.
    tiles = (rows + 3) // 4
    pace = (LINE + tiles - 1) // tiles
    part = width // STEP * pace
    for c in range(0, columns - 2, 3):
        w_c, y_c = w + c * w_stride, y + c * FLOAT
        ahead = w_c + 3 * w_stride
        for r in range(0, whole, 4):
            dot_tile(4, 3, x + r * x_stride, x_stride, w_c, w_stride, y_c + r * y_stride, y_stride, width, ahead, pace)
            ahead += part
        if rows % 4 == 3:
            dot_tile(3, 3, rest_x, x_stride, w_c, w_stride, y_c + rest_y, y_stride, width, ahead, pace)
        elif rows % 4 == 2:
            dot_tile(2, 3, rest_x, x_stride, w_c, w_stride, y_c + rest_y, y_stride, width, ahead, pace)
        elif rows % 4 == 1:
            dot_tile(1, 3, rest_x, x_stride, w_c, w_stride, y_c + rest_y, y_stride, width, ahead, pace)
    for c in range(columns - columns % 3, columns):
        w_c, y_c = w + c * w_stride, y + c * FLOAT
        ahead = w_c + _AHEAD
        for r in range(0, whole, 4):
            dot_tile(4, 1, x + r * x_stride, x_stride, w_c, w_stride, y_c + r * y_stride, y_stride, width, ahead, LINE)
        for r in range(whole, rows):
            dot_tile(1, 1, x + r * x_stride, x_stride, w_c, w_stride, y_c + r * y_stride, y_stride, width, ahead, LINE)


@njit(cache=CACHE)
def interleave(x: Any, x_stride: Any, width: Any, panel: Any) -> None:
    """PANEL rows as `panel_tile` reads them: of each BLOCK every LANES-th d, then the ones behind these, and so on."""
    panel_DR = carray(floats_at(panel), (width, PANEL))
    whole = width - width % PANEL
    for block in range(0, whole, BLOCK):
        per_lane = min(BLOCK, whole - block) // LANES
        for step in range(0, per_lane, 2):  # in pieces that stay in the nearest cache
            for r in range(PANEL):
                x_D = carray(floats_at(x + r * x_stride), (width,))
                for piece in range(step, step + 2):
                    for lane in range(LANES):
                        panel_DR[block + lane * per_lane + piece, r] = x_D[block + piece * LANES + lane]
    for r in range(PANEL):
        x_D = carray(floats_at(x + r * x_stride), (width,))
        for d in range(whole, width):
            panel_DR[d, r] = x_D[d]


@njit(cache=CACHE)
def place_in_panel(d: Any, width: Any) -> Any:
    """Where `interleave` puts the rows' floats d."""
    whole = width - width % PANEL
    if d >= whole:
        return d
    block = d - d % BLOCK
    return block + d % LANES * (min(BLOCK, whole - block) // LANES) + d % BLOCK // LANES


@njit(cache=CACHE)
def _panel_tiles(
    some: Any, wide: Any, across: Any, rows: Any, panels: Any, columns: Any, w: Any, w_stride: Any, y: Any,
    y_stride: Any, width: Any,
) -> None:  # fmt: skip
    """As `panel_dots`, by tiles of one shape, of which the rows are a multiple; at least `wide` columns."""
    for column in range(0, columns, wide):
        c = min(column, columns - wide)  # the last tile begins where it fits, and makes some once more
        w_c, y_c = w + c * w_stride, y + c * (PANEL if across else 1) * FLOAT
        for r in range(0, rows, some * PANEL):
            panels_r, y_r = panels + r * width * FLOAT, y_c + (r // PANEL if across else r) * y_stride
            panel_tile(
                literally(some), literally(wide), literally(across), panels_r, w_c, w_stride, y_r, y_stride, width
            )


@njit(cache=CACHE)
def panel_dots(
    across: Any, rows: Any, panels: Any, columns: Any, w: Any, w_stride: Any, y: Any, y_stride: Any, width: Any
) -> None:
    """As `dots`, of whole panels that lie one after the other, each as `interleave` makes it.

    `across` is 0, or 1 for results in panels as `panel_tile` makes them.
    """
    size = width * FLOAT  # of a panel, for each of its rows
    if columns < max(LARGE[1], MEDIUM[1], SMALL[1]):
        _panel_tiles(1, 1, across, rows, panels, columns, w, w_stride, y, y_stride, width)
    else:
        y_row = y_stride // PANEL if across else y_stride
        some = rows - rows % (LARGE[0] * PANEL)
        more = rows - rows % (MEDIUM[0] * PANEL)
        _panel_tiles(LARGE[0], LARGE[1], across, some, panels, columns, w, w_stride, y, y_stride, width)
        panels_m, y_m = panels + some * size, y + some * y_row
        _panel_tiles(MEDIUM[0], MEDIUM[1], across, more - some, panels_m, columns, w, w_stride, y_m, y_stride, width)
        panels_s, y_s = panels + more * size, y + more * y_row
        _panel_tiles(SMALL[0], SMALL[1], across, rows - more, panels_s, columns, w, w_stride, y_s, y_stride, width)


@njit(cache=CACHE)
def add_weighted_sums(
    rows: Any, p: Any, p_stride: Any, count: Any, v: Any, v_stride: Any, y: Any, y_stride: Any, width: Any
) -> None:
    """y[r] += sum of p[r, i] * v[i] over `count` rows at v; p[r, i] at p + r * p_stride + i * FLOAT."""
    whole = rows - rows % 4
    for r in range(0, whole, 4):
        add_weighted(4, p + r * p_stride, p_stride, v, v_stride, count, y + r * y_stride, y_stride, width)
    for r in range(whole, rows):
        add_weighted(1, p + r * p_stride, p_stride, v, v_stride, count, y + r * y_stride, y_stride, width)
