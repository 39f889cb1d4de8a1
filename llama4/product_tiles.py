"""Products and weighted sums held in registers, emitted as LLVM vectors: one generator makes a tile of any shape.

Addresses and strides count bytes; rows of float32 may have any width.

Shapes: R rows of a tile, C columns of a tile.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from llama4.emitter import FLOAT32, INT, LANES, LEAST_EXPONENT, STEP, Emitter
from llama4.intrinsics import PANEL, WIDE

# Sums are made in LANES parts on every processor, BLOCK floats at a time, so that a product has the same bits on all.
BLOCK = 1024  # of a row's floats, that stay in the nearest cache while a panel_tile goes through its lanes
_VECTOR = ir.VectorType(FLOAT32, LANES)


@intrinsic(prefer_literal=True)
def dot_tile(
    typing_context: Any, rows: Any, columns: Any, x: Any, x_stride: Any, w: Any, w_stride: Any, y: Any, y_stride: Any,
    width: Any, ahead: Any, pace: Any,
) -> Any:  # fmt: skip
    """y[r, c] = x[r] . w[c], for literal numbers of rows and columns: their product is what the registers can hold.

    x[r] is at x + r * x_stride, w[c] at w + c * w_stride, `width` floats each; y[r, c] at y + r * y_stride + 4 * c.
    Meanwhile, for each c, what lies from ahead + c * w_stride on is fetched, `pace` bytes for each cache line of w[c].
    """
    if not isinstance(rows, types.IntegerLiteral) or not isinstance(columns, types.IntegerLiteral):
        return None
    tile_r, tile_c = range(rows.literal_value), range(columns.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emitter(builder)
        x, x_stride, w, w_stride, y, y_stride, width, ahead, pace = arguments[2:]
        xs, ws = [emit.place(x, x_stride, r) for r in tile_r], [emit.place(w, w_stride, c) for c in tile_c]
        fetched = [emit.place(ahead, w_stride, c) for c in tile_c]
        vectors = [[emit.variable(_VECTOR) for _ in tile_c] for _ in tile_r]
        totals = [[emit.variable(FLOAT32) for _ in tile_c] for _ in tile_r]
        whole = emit.whole_steps(width)
        with emit.loop(emit.number(0), whole, BLOCK) as start:
            for r in tile_r:
                for c in tile_c:
                    builder.store(ir.Constant(_VECTOR, None), vectors[r][c])
            stop = emit.least(builder.add(start, emit.number(BLOCK)), whole)
            with emit.loop(start, stop, STEP) as d:
                for part in (0, LANES):
                    columns_d = [emit.load(_VECTOR, at, d, part) for at in ws]
                    for at in fetched if part == 0 else ():
                        emit.prefetch(emit.place(at, pace, builder.udiv(d, emit.number(STEP))), nearness=2)
                    for r in tile_r:
                        row_d = emit.load(_VECTOR, xs[r], d, part)
                        for c in tile_c:
                            emit.fma(vectors[r][c], row_d, columns_d[c])
            for r in tile_r:
                for c in tile_c:
                    emit.add(totals[r][c], emit.total(vectors[r][c]))
        with emit.loop(whole, width, 1) as d:
            for r in tile_r:
                for c in tile_c:
                    emit.fma(totals[r][c], emit.load(FLOAT32, xs[r], d), emit.load(FLOAT32, ws[c], d))
        for r in tile_r:
            for c in tile_c:
                emit.store(builder.load(totals[r][c]), emit.place(y, y_stride, r), emit.number(c))
        return context.get_dummy_value()

    return types.void(rows, columns, *[types.int64] * 9), generate


@intrinsic(prefer_literal=True)
def panel_tile(
    typing_context: Any, panels: Any, columns: Any, across: Any, panel: Any, w: Any, w_stride: Any, y: Any,
    y_stride: Any, width: Any,
) -> Any:  # fmt: skip
    """y[r, c] = x[r] . w[c] for literal numbers of columns and of panels of rows, which `tiles.interleave` has made.

    Bit for bit what a dot_tile gives: the sums of its lanes are made here one after the other, each for all rows.
    y[r, c] is at y + r * y_stride + 4 * c if the literal `across` is 0. If it is 1 the results are panels as well, one
    every y_stride, of which each column's PANEL floats lie one after the other.
    """
    if not all(isinstance(kind, types.IntegerLiteral) for kind in (panels, columns, across)):
        return None
    tile_p, tile_c = range(panels.literal_value), range(columns.literal_value)
    parts = [(p, part) for p in tile_p for part in range(0, PANEL, WIDE.count)]
    tile = [(c, p, part) for c in tile_c for p, part in parts]
    rows_per_lane = len(tile_p) * PANEL // LANES

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emitter(builder)
        panel, w, w_stride, y, y_stride, width = arguments[3:]
        xs = [emit.place(panel, builder.mul(width, emit.number(4 * PANEL)), p) for p in tile_p]
        ws = [emit.place(w, w_stride, c) for c in tile_c]
        next_w = emit.place(w, w_stride, len(ws))  # the next tile's are fetched, a row for each lane
        sums, totals = [emit.variable(WIDE) for _ in tile], [emit.variable(WIDE) for _ in tile]
        room = cgutils.alloca_once(builder, WIDE, size=LANES * len(tile))  # each lane's sums

        def kept(lane: Any, n: int) -> Any:
            return builder.gep(room, [builder.add(builder.mul(lane, emit.number(len(tile))), emit.number(n))])

        def add(to: list[Any], place: Any, d: Any) -> None:
            first = builder.mul(place, emit.number(PANEL))
            rows_d = [emit.load(WIDE, xs[p], first, part) for p, part in parts]
            for c in tile_c:
                column_d = emit.spread(WIDE, emit.load(FLOAT32, ws[c], d))
                for n, row_d in enumerate(rows_d, c * len(parts)):
                    emit.fma(to[n], row_d, column_d)

        whole = emit.whole_steps(width)
        with emit.loop(emit.number(0), whole, BLOCK) as start:
            per_lane = builder.udiv(emit.least(builder.sub(whole, start), emit.number(BLOCK)), emit.number(LANES))
            with emit.loop(emit.number(0), emit.number(LANES), 1) as lane:
                for total in sums:
                    builder.store(ir.Constant(WIDE, None), total)
                for n in () if across.literal_value else range(rows_per_lane):  # written in the end
                    row = builder.add(builder.mul(lane, emit.number(rows_per_lane)), emit.number(n))
                    emit.prefetch(emit.place(y, y_stride, row), writing=True)
                before = builder.add(start, builder.mul(per_lane, lane))
                with emit.loop(emit.number(0), per_lane, 2) as step:  # of a cache line
                    for place in (step, builder.add(step, emit.number(1))):
                        d = builder.add(builder.mul(place, emit.number(LANES)), lane)
                        add(sums, builder.add(before, place), builder.add(start, d))
                    emit.prefetch(emit.address(emit.place(next_w, w_stride, lane), builder.add(start, d)), nearness=2)
                for n, total in enumerate(sums):
                    builder.store(builder.load(total), kept(lane, n))
            for n, total in enumerate(totals):
                emit.add(total, emit.tree([builder.load(kept(emit.number(lane), n)) for lane in range(LANES)]))
        with emit.loop(whole, width, 1) as d:
            add(totals, d, d)
        if across.literal_value:
            for (c, p, part), total in zip(tile, totals, strict=True):
                emit.store(builder.load(total), emit.place(y, y_stride, p), emit.number(c * PANEL), part)
            return context.get_dummy_value()
        for n, total in enumerate(totals):
            builder.store(builder.load(total), kept(emit.number(0), n))
        made = builder.ptrtoint(room, INT)
        with emit.loop(emit.number(0), emit.number(WIDE.count), 1) as row:  # by memory: shuffles wait for products
            for n, (c, p, part) in enumerate(tile):
                y_r = emit.place(y, y_stride, builder.add(row, emit.number(p * PANEL + part)))
                emit.store(emit.load(FLOAT32, made, row, n * WIDE.count), y_r, emit.number(c))
        return context.get_dummy_value()

    return types.void(panels, columns, across, *[types.int64] * 6), generate


@intrinsic
def gate_tile(typing_context: Any, gate: Any, up: Any, y: Any) -> Any:
    """y = silu(gate) * up, of PANEL floats each."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emitter(builder)
        gate, up, y = arguments
        first, none, one = emit.number(0), ir.Constant(WIDE, None), emit.all(WIDE, 1.0)
        for part in range(0, PANEL, WIDE.count):
            x = emit.load(WIDE, gate, first, part)
            positive = builder.fcmp_ordered(">", x, none)
            small = emit.exp(builder.select(positive, builder.fneg(x), x))
            # sigmoid(x) = 1 / (1 + e^-x) = e^x / (1 + e^x): `exp` takes what is not positive, and not too small
            share = builder.fdiv(builder.select(positive, one, small), builder.fadd(one, small))
            share = builder.select(builder.fcmp_ordered("<", x, emit.all(WIDE, LEAST_EXPONENT)), none, share)
            product = builder.fmul(builder.fmul(x, share), emit.load(WIDE, up, first, part))
            emit.store(product, y, first, part)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


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
