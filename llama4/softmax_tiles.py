"""Attention of many queries, a tile at a time: sums of outer products, and the softmax of their scores.

Emitted as LLVM vectors over queries that lie side by side. Addresses and strides count bytes.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from llama4.emitter import FLOAT32, Emitter
from llama4.intrinsics import SIDE, UNSEEN, WIDE


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
    parts = range(0, SIDE, WIDE.count)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emitter(builder)
        a, b, b_step, b_column, count, y = arguments[2:]
        ys = [emit.address(y, emit.number(c * SIDE)) for c in tile_c]
        zero = emit.number(0)
        sums = [[emit.variable(WIDE, emit.load(WIDE, at, zero, p) if adds else None) for p in parts] for at in ys]
        with emit.loop(zero, count, 1) as i:
            a_i, b_i = emit.address(a, builder.mul(i, emit.number(SIDE))), emit.place(b, b_step, i)
            vectors = [emit.load(WIDE, a_i, zero, p) for p in parts]
            for c in tile_c:
                factor = emit.spread(WIDE, emit.load(FLOAT32, emit.place(b_i, b_column, c), zero))
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
        for part in range(0, SIDE, WIDE.count):
            before = emit.load(WIDE, sums, zero, part)
            largest = emit.variable(WIDE, before)
            with emit.loop(zero, keys, 1) as key:
                score = emit.load(WIDE, scores, builder.mul(key, room), part)
                builder.store(emit.greater(score, builder.load(largest)), largest)
            top = builder.load(largest)
            factor = emit.exp(builder.fsub(before, top))
            total = emit.variable(WIDE, builder.fmul(emit.load(WIDE, sums, room, part), factor))
            with emit.loop(zero, keys, 1) as key:
                at = builder.mul(key, room)
                score = emit.load(WIDE, scores, at, part)
                seen = builder.fcmp_ordered(">", score, emit.all(WIDE, UNSEEN))
                weight = builder.select(seen, emit.exp(builder.fsub(score, top)), ir.Constant(WIDE, None))
                emit.store(weight, scores, at, part)
                builder.store(builder.fadd(builder.load(total), weight), total)
            emit.store(top, sums, zero, part)
            emit.store(builder.load(total), sums, room, part)
            with emit.loop(zero, width, 1) as e:
                at = builder.mul(e, room)
                emit.store(builder.fmul(emit.load(WIDE, out, at, part), factor), out, at, part)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate
