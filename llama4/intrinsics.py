"""What the CPU kernels need and numba has no word for: addresses, atomic counters, small products held in registers.

The products are emitted as LLVM vectors: one generator makes a tile of any shape. Addresses and strides count bytes;
rows of float32 may have any width.

Shapes: R rows of a tile, C columns of a tile.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from llama4.emitter import BIT32, FLOAT32, LANES, STEP, Emitter

# Compiling takes seconds, so its results are kept. numba itself only looks at the file of the outermost function to
# see whether they are up to date.
_HERE = Path(__file__).parent
_SHARED = b"".join((_HERE / name).read_bytes() for name in ("emitter.py", "intrinsics.py", "tiles.py"))
CACHE = os.access(_HERE, os.W_OK)
if CACHE:
    numba.config.CACHE_DIR = str(_HERE / "__pycache__" / hashlib.blake2b(_SHARED, digest_size=8).hexdigest())

PANEL = 2 * LANES  # rows of a panel
# Sums are made in LANES parts on every processor, so that a product has the same bits on all. Rows have no order, and
# take the widest registers. Of panel_tiles, (panels, columns), the largest computes with most of them: 24 sums and four
# vectors of rows at once, of 32. AVX2 has half as many, of half the size.
_WIDE_REGISTERS = bool(get_host_cpu_features().get("avx512f"))
LARGE, MEDIUM, SMALL = ((4, 6), (2, 8), (1, 8)) if _WIDE_REGISTERS else ((1, 6),) * 3
SIDE, OUTER_COLUMNS = (2 * PANEL, 8) if _WIDE_REGISTERS else (PANEL, 4)  # of an outer_tile
UNSEEN = -1e30  # a score below all others
BLOCK = 1024  # of a row's floats, that stay in the nearest cache while a panel_tile goes through its lanes
_AHEAD = 1024  # floats of a lone stream that are on their way
_VECTOR = ir.VectorType(FLOAT32, LANES)
_ROWS = ir.VectorType(FLOAT32, PANEL if _WIDE_REGISTERS else LANES)


def _cast(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))


@intrinsic
def floats_at(typing_context: Any, address: Any) -> Any:
    """The address as a pointer to float32."""
    return types.CPointer(types.float32)(types.int64), _cast


@intrinsic
def ints_at(typing_context: Any, address: Any) -> Any:
    """The address as a pointer to int64."""
    return types.CPointer(types.int64)(types.int64), _cast


@intrinsic
def float_of_bits(typing_context: Any, bits: Any) -> Any:
    """The float32 that has these 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], FLOAT32)

    return types.float32(types.int32), generate


@intrinsic
def prefetch(typing_context: Any, address: Any) -> Any:
    """Begins to bring the cache line at this address into the cache; any address is allowed."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        Emitter(builder).prefetch(arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def fetch_add(typing_context: Any, pointer: Any, index: Any, amount: Any) -> Any:
    """Adds to pointer[index] in one step and returns what was there before; orders all reads and writes around it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base, offset, increment = arguments
        return builder.atomic_rmw("add", builder.gep(base, [offset]), increment, "seq_cst")

    return types.int64(types.CPointer(types.int64), types.int64, types.int64), generate


@intrinsic(prefer_literal=True)
def dot_tile(
    typing_context: Any, rows: Any, columns: Any, x: Any, x_stride: Any, w: Any, w_stride: Any, y: Any, y_stride: Any,
    width: Any,
) -> Any:  # fmt: skip
    """y[r, c] = x[r] . w[c], for literal numbers of rows and columns: their product is what the registers can hold.

    x[r] is at x + r * x_stride, w[c] at w + c * w_stride, `width` floats each; y[r, c] at y + r * y_stride + 4 * c.
    """
    if not isinstance(rows, types.IntegerLiteral) or not isinstance(columns, types.IntegerLiteral):
        return None
    tile_r, tile_c = range(rows.literal_value), range(columns.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emitter(builder)
        x, x_stride, w, w_stride, y, y_stride, width = arguments[2:]
        xs, ws = [emit.place(x, x_stride, r) for r in tile_r], [emit.place(w, w_stride, c) for c in tile_c]
        # Processors fetch one stream ahead by themselves, if not far enough, and several not at all.
        next_ws = [emit.place(w, w_stride, len(ws) + c) for c in tile_c]
        fetched = next_ws if len(ws) > 1 else [emit.address(w, emit.number(_AHEAD))]
        vectors = [[emit.variable(_VECTOR) for _ in tile_c] for _ in tile_r]
        with emit.loop(emit.number(0), emit.whole_steps(width), STEP) as d:
            for part in (0, LANES):
                columns_d = [emit.load(_VECTOR, at, d, part) for at in ws]
                for at in fetched if part == 0 else ():
                    emit.prefetch(emit.address(at, d), nearness=2)
                for r in tile_r:
                    row_d = emit.load(_VECTOR, xs[r], d, part)
                    for c in tile_c:
                        emit.fma(vectors[r][c], row_d, columns_d[c])
        sums = [[emit.variable(FLOAT32, emit.total(vectors[r][c])) for c in tile_c] for r in tile_r]
        with emit.loop(emit.whole_steps(width), width, 1) as d:
            for r in tile_r:
                for c in tile_c:
                    emit.fma(sums[r][c], emit.load(FLOAT32, xs[r], d), emit.load(FLOAT32, ws[c], d))
        for r in tile_r:
            for c in tile_c:
                emit.store(builder.load(sums[r][c]), emit.place(y, y_stride, r), emit.number(c))
        return context.get_dummy_value()

    return types.void(rows, columns, *[types.int64] * 7), generate


@intrinsic(prefer_literal=True)
def panel_tile(
    typing_context: Any, panels: Any, columns: Any, panel: Any, w: Any, w_stride: Any, y: Any, y_stride: Any, width: Any
) -> Any:
    """y[r, c] = x[r] . w[c] for literal numbers of columns and of panels of rows, which `tiles.interleave` has made.

    Bit for bit what a dot_tile gives: the sums of its lanes are made here one after the other, each for all rows.
    """
    if not isinstance(panels, types.IntegerLiteral) or not isinstance(columns, types.IntegerLiteral):
        return None
    tile_p, tile_c = range(panels.literal_value), range(columns.literal_value)
    parts = [(p, part) for p in tile_p for part in range(0, PANEL, _ROWS.count)]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emitter(builder)
        panel, w, w_stride, y, y_stride, width = arguments[2:]
        xs = [emit.place(panel, builder.mul(width, emit.number(4 * PANEL)), p) for p in tile_p]
        ws = [emit.place(w, w_stride, c) for c in tile_c]
        next_w = emit.place(w, w_stride, len(ws))  # the next tile's are fetched, a row for each lane
        sums = [[emit.variable(_ROWS) for _ in parts] for _ in tile_c]
        flat = [total for of_column in sums for total in of_column]
        # In memory, of which each lane's are in registers in their turn.
        lane_sums = cgutils.alloca_once(builder, _ROWS, size=LANES * len(flat))

        def kept(lane: Any, n: int) -> Any:
            return builder.gep(lane_sums, [builder.add(builder.mul(lane, emit.number(len(flat))), emit.number(n))])

        def add(place: Any, d: Any) -> None:
            first = builder.mul(place, emit.number(PANEL))
            rows_d = [emit.load(_ROWS, xs[p], first, part) for p, part in parts]
            for c in tile_c:
                column_d = emit.spread(_ROWS, emit.load(FLOAT32, ws[c], d))
                for row_d, total in zip(rows_d, sums[c], strict=True):
                    emit.fma(total, row_d, column_d)

        with emit.loop(emit.number(0), emit.number(LANES), 1) as lane:
            for n in range(len(flat)):
                builder.store(ir.Constant(_ROWS, None), kept(lane, n))
        whole = emit.whole_steps(width)
        with emit.loop(emit.number(0), whole, BLOCK) as start:
            per_lane = builder.udiv(emit.least(builder.sub(whole, start), emit.number(BLOCK)), emit.number(LANES))
            with emit.loop(emit.number(0), emit.number(LANES), 1) as lane:
                for n, total in enumerate(flat):
                    builder.store(builder.load(kept(lane, n)), total)
                before = builder.add(start, builder.mul(per_lane, lane))
                with emit.loop(emit.number(0), per_lane, 2) as step:  # of a cache line
                    for place in (step, builder.add(step, emit.number(1))):
                        d = builder.add(builder.mul(place, emit.number(LANES)), lane)
                        add(builder.add(before, place), builder.add(start, d))
                    emit.prefetch(emit.address(emit.place(next_w, w_stride, lane), builder.add(start, d)), nearness=2)
                for n, total in enumerate(flat):
                    builder.store(builder.load(total), kept(lane, n))
        for n, total in enumerate(flat):
            builder.store(emit.tree([builder.load(kept(emit.number(lane), n)) for lane in range(LANES)]), total)
        with emit.loop(whole, width, 1) as d:
            add(d, d)
        for c in tile_c:
            for (p, part), total in zip(parts, sums[c], strict=True):
                vector = builder.load(total)
                for row in range(_ROWS.count):
                    value = builder.extract_element(vector, ir.Constant(BIT32, row))
                    emit.store(value, emit.place(y, y_stride, p * PANEL + part + row), emit.number(c))
        return context.get_dummy_value()

    return types.void(panels, columns, *[types.int64] * 6), generate


@intrinsic(prefer_literal=True)
def outer_tile(
    typing_context: Any, columns: Any, adding: Any, a: Any, b: Any, b_step: Any, b_column: Any, count: Any, y: Any
) -> Any:
    """y[c] = sum of a[i] * b[i, c] over `count` vectors a of SIDE floats; onto what is there if `adding` is 1, not 0.

    For a literal number of columns. a[i] and y[c] lie one after the other, b[i, c] is at b + i * b_step + c * b_column.
    """
    if not isinstance(columns, types.IntegerLiteral) or not isinstance(adding, types.IntegerLiteral):
        return None
    tile_c, adds = range(columns.literal_value), adding.literal_value
    parts = range(0, SIDE, _ROWS.count)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emitter(builder)
        a, b, b_step, b_column, count, y = arguments[2:]
        ys = [emit.address(y, emit.number(c * SIDE)) for c in tile_c]
        zero = emit.number(0)
        sums = [[emit.variable(_ROWS, emit.load(_ROWS, at, zero, p) if adds else None) for p in parts] for at in ys]
        with emit.loop(zero, count, 1) as i:
            a_i, b_i = emit.address(a, builder.mul(i, emit.number(SIDE))), emit.place(b, b_step, i)
            vectors = [emit.load(_ROWS, a_i, zero, p) for p in parts]
            for c in tile_c:
                factor = emit.spread(_ROWS, emit.load(FLOAT32, emit.place(b_i, b_column, c), zero))
                for vector, total in zip(vectors, sums[c], strict=True):
                    emit.fma(total, vector, factor)
        for at, of_column in zip(ys, sums, strict=True):
            for p, total in zip(parts, of_column, strict=True):
                emit.store(builder.load(total), at, zero, p)
        return context.get_dummy_value()

    return types.void(columns, adding, *[types.int64] * 6), generate


@intrinsic
def softmax_tile(typing_context: Any, scores: Any, keys: Any, sums: Any, out: Any, width: Any) -> Any:
    """Turns `keys` scores of SIDE queries into weights exp(score - largest); those up to UNSEEN become 0.

    sums: the largest score so far and the sum of weights, of all queries each. That sum and out[e], of `width` e, which
    are of earlier keys, are brought to the new largest score's scale, and the new weights added to the sum.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emitter(builder)
        scores, keys, sums, out, width = arguments
        zero, room = emit.number(0), emit.number(SIDE)
        for part in range(0, SIDE, _ROWS.count):
            before = emit.load(_ROWS, sums, zero, part)
            largest = emit.variable(_ROWS, before)
            with emit.loop(zero, keys, 1) as key:
                score = emit.load(_ROWS, scores, builder.mul(key, room), part)
                builder.store(emit.greater(score, builder.load(largest)), largest)
            top = builder.load(largest)
            factor = emit.exp(builder.fsub(before, top))
            total = emit.variable(_ROWS, builder.fmul(emit.load(_ROWS, sums, room, part), factor))
            with emit.loop(zero, keys, 1) as key:
                at = builder.mul(key, room)
                score = emit.load(_ROWS, scores, at, part)
                seen = builder.fcmp_ordered(">", score, emit.all(_ROWS, UNSEEN))
                weight = builder.select(seen, emit.exp(builder.fsub(score, top)), ir.Constant(_ROWS, None))
                emit.store(weight, scores, at, part)
                builder.store(builder.fadd(builder.load(total), weight), total)
            emit.store(top, sums, zero, part)
            emit.store(builder.load(total), sums, room, part)
            with emit.loop(zero, width, 1) as e:
                at = builder.mul(e, room)
                emit.store(builder.fmul(emit.load(_ROWS, out, at, part), factor), out, at, part)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@intrinsic(prefer_literal=True)
def add_weighted(
    typing_context: Any, rows: Any, p: Any, p_stride: Any, v: Any, v_stride: Any, count: Any, y: Any, y_stride: Any,
    width: Any,
) -> Any:  # fmt: skip
    """y[r] += sum of p[r, i] * v[i] over `count` vectors v, for a literal number of rows, up to four.

    p[r, i] is at p + r * p_stride + 4 * i, v[i] at v + i * v_stride and y[r] at y + r * y_stride, `width` floats each.
    """
    if not isinstance(rows, types.IntegerLiteral):
        return None
    tile_r = range(rows.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emitter(builder)
        p, p_stride, v, v_stride, count, y, y_stride, width = arguments[1:]
        ps, ys = [emit.place(p, p_stride, r) for r in tile_r], [emit.place(y, y_stride, r) for r in tile_r]

        def add(kind: ir.Type, parts: tuple[int, ...], d: Any) -> None:
            sums = [[emit.variable(kind, emit.load(kind, ys[r], d, part)) for part in parts] for r in tile_r]
            with emit.loop(emit.number(0), count, 1) as i:
                at = builder.add(v, builder.mul(i, v_stride))
                values = [emit.load(kind, at, d, part) for part in parts]
                for r in tile_r:
                    weight = emit.spread(kind, emit.load(FLOAT32, ps[r], i))
                    for k in range(len(parts)):
                        emit.fma(sums[r][k], weight, values[k])
            for r in tile_r:
                for k, part in enumerate(parts):
                    emit.store(builder.load(sums[r][k]), ys[r], d, part)

        with emit.loop(emit.number(0), emit.whole_steps(width), STEP) as d:
            add(_VECTOR, (0, LANES), d)
        with emit.loop(emit.whole_steps(width), width, 1) as d:
            add(FLOAT32, (0,), d)
        return context.get_dummy_value()

    return types.void(rows, *[types.int64] * 8), generate
