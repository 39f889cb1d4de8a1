"""Attention a tile at a time: scores, the softmax of a block of keys, and sums of outer products.

Emitted as LLVM vectors, for one query over keys that lie side by side and for many queries over one key: a query gets
the same bits either way. A score is summed over its floats in turn, what is weighted by the scores key by key, and the
weights in LANES parts, every LANES-th key's in one. Addresses and strides count bytes.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from llama4.emitter import BIT32, FLOAT32, LANES, Emitter
from llama4.intrinsics import SIDE, UNSEEN, WIDE

KEYS = WIDE.count  # of a score_tile


@intrinsic
def exp(typing_context: Any, x: Any) -> Any:
    """exp(x) for x <= 0, as the tiles compute it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emitter(builder)
        return builder.extract_element(emit.exp(emit.spread(WIDE, arguments[0])), BIT32(0))

    return types.float32(types.float32), generate


@intrinsic(prefer_literal=True)
def score_tile(
    typing_context: Any, queries: Any, q: Any, q_stride: Any, k: Any, k_stride: Any, some: Any, next_k: Any, width: Any,
    y: Any, y_stride: Any,
) -> Any:  # fmt: skip
    """y[r, i] = q[r] . k[i] for a literal number of queries and KEYS keys; those from `some` on are the last one again.

    q[r] is at q + r * q_stride, k[i] at k + i * k_stride, y[r] at y + r * y_stride. What lies at next_k like k is
    fetched.
    """
    if not isinstance(queries, types.IntegerLiteral):
        return None
    tile_r, tile_k = range(queries.literal_value), range(KEYS)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emitter(builder)
        q, q_stride, k, k_stride, some, next_k, width, y, y_stride = arguments[1:]
        last = builder.sub(some, emit.number(1))
        ks = [emit.place(k, k_stride, emit.least(emit.number(i), last)) for i in tile_k]
        next_ks = [emit.place(next_k, k_stride, i) for i in tile_k]
        qs = [emit.place(q, q_stride, r) for r in tile_r]
        sums = [emit.variable(WIDE) for _ in tile_r]

        def add(keys_d: Any, d: Any, part: int = 0) -> None:
            for total, at in zip(sums, qs, strict=True):
                emit.fma(total, keys_d, emit.spread(WIDE, emit.load(FLOAT32, at, d, part)))

        whole = builder.and_(width, emit.number(-KEYS))
        with emit.loop(emit.number(0), whole, KEYS) as d:
            for at in next_ks:
                emit.prefetch(emit.address(at, d))
            for part, keys_d in enumerate(emit.transposed([emit.load(WIDE, at, d) for at in ks])):
                add(keys_d, d, part)
        with emit.loop(whole, width, 1) as d:
            add(emit.vector([emit.load(FLOAT32, at, d) for at in ks]), d)
        for r, total in zip(tile_r, sums, strict=True):
            emit.store(builder.load(total), emit.place(y, y_stride, r), emit.number(0))
        return context.get_dummy_value()

    return types.void(queries, *[types.int64] * 9), generate


@intrinsic
def weigh(typing_context: Any, scores: Any, keys: Any, sums: Any) -> Any:
    """Turns a query's scores, one after the other, into weights exp(score - largest).

    `keys` of them; there is room for a multiple of KEYS. sums: becomes the largest score and the sum of weights.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emitter(builder)
        scores, keys, sums = arguments
        zero, unseen = emit.number(0), emit.all(WIDE, UNSEEN)
        numbers = ir.Constant(ir.VectorType(BIT32, KEYS), list(range(KEYS)))
        largest = emit.variable(WIDE, unseen)
        with emit.loop(zero, keys, KEYS) as key:
            left = emit.spread(numbers.type, builder.trunc(builder.sub(keys, key), BIT32))
            there = builder.icmp_signed("<", numbers, left)
            score = builder.select(there, emit.load(WIDE, scores, key), unseen)
            emit.store(score, scores, key)
            builder.store(emit.greater(score, builder.load(largest)), largest)
        top = emit.largest(builder.load(largest))
        total, spread_top = emit.variable(ir.VectorType(FLOAT32, LANES)), emit.spread(WIDE, top)
        with emit.loop(zero, keys, KEYS) as key:
            weight = _weight(emit, builder, emit.load(WIDE, scores, key), spread_top)
            emit.store(weight, scores, key)
            for part in range(0, KEYS, LANES):
                emit.add(total, emit.lanes(weight, part, LANES))
        emit.store(top, sums, zero)
        emit.store(emit.total(total), sums, zero, 1)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@intrinsic
def weigh_tile(typing_context: Any, scores: Any, keys: Any, sums: Any, scales: Any) -> Any:
    """Turns the scores of `keys` keys, a multiple of LANES, for SIDE queries each, into weights exp(score - largest).

    sums: the largest score and the sum of weights, of earlier keys; becomes those of all. scales: what earlier weights
    have to be multiplied with, and these.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emitter(builder)
        scores, keys, sums, scales = arguments
        zero, room = emit.number(0), emit.number(SIDE)
        for part in range(0, SIDE, WIDE.count):
            largest = emit.variable(WIDE, emit.all(WIDE, UNSEEN))
            with emit.loop(zero, keys, 1) as key:
                score = emit.load(WIDE, scores, builder.mul(key, room), part)
                builder.store(emit.greater(score, builder.load(largest)), largest)
            block_top = builder.load(largest)
            totals = [emit.variable(WIDE) for _ in range(LANES)]
            with emit.loop(zero, keys, LANES) as key:
                for lane, total in enumerate(totals):
                    at = builder.mul(builder.add(key, emit.number(lane)), room)
                    weight = _weight(emit, builder, emit.load(WIDE, scores, at, part), block_top)
                    emit.store(weight, scores, at, part)
                    emit.add(total, weight)
            before = emit.load(WIDE, sums, zero, part)
            top = emit.greater(before, block_top)
            old, new = (emit.exp(builder.fsub(one, top)) for one in (before, block_top))
            block_total = emit.tree([builder.load(total) for total in totals])
            total_before = builder.fmul(emit.load(WIDE, sums, room, part), old)
            emit.store(top, sums, zero, part)
            emit.store(builder.fadd(total_before, builder.fmul(block_total, new)), sums, room, part)
            emit.store(old, scales, zero, part)
            emit.store(new, scales, room, part)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


def _weight(emit: Emitter, builder: Any, score: Any, top: Any) -> Any:
    """exp(score - top); of scores up to UNSEEN, 0."""
    seen = builder.fcmp_ordered(">", score, emit.all(WIDE, UNSEEN))
    return builder.select(seen, emit.exp(builder.fsub(score, top)), ir.Constant(WIDE, None))


@intrinsic(prefer_literal=True)
def outer_tile(
    typing_context: Any, columns: Any, a: Any, b: Any, b_step: Any, b_column: Any, count: Any, y: Any
) -> Any:
    """y[c] = sum of a[i] * b[i, c] over `count` vectors a of SIDE floats, for a literal number of columns.

    a[i] and y[c] lie one after the other, b[i, c] is at b + i * b_step + c * b_column.
    """
    if not isinstance(columns, types.IntegerLiteral):
        return None
    tile_c, parts = range(columns.literal_value), range(0, SIDE, WIDE.count)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emitter(builder)
        a, b, b_step, b_column, count, y = arguments[1:]
        zero = emit.number(0)
        sums = [[emit.variable(WIDE) for _ in parts] for _ in tile_c]
        with emit.loop(zero, count, 1) as i:
            a_i, b_i = emit.address(a, builder.mul(i, emit.number(SIDE))), emit.place(b, b_step, i)
            vectors = [emit.load(WIDE, a_i, zero, p) for p in parts]
            for c in tile_c:
                factor = emit.spread(WIDE, emit.load(FLOAT32, emit.place(b_i, b_column, c), zero))
                for vector, total in zip(vectors, sums[c], strict=True):
                    emit.fma(total, vector, factor)
        for c, of_column in zip(tile_c, sums, strict=True):
            for p, total in zip(parts, of_column, strict=True):
                emit.store(builder.load(total), emit.address(y, emit.number(c * SIDE)), zero, p)
        return context.get_dummy_value()

    return types.void(columns, *[types.int64] * 6), generate
