"""What the CPU kernels need and numba has no word for: addresses, atomic counters, small products held in registers.

The products are emitted as LLVM vectors: one generator makes a tile of any shape. Addresses and strides count bytes;
rows of float32 may have any width.

Shapes: R rows of a tile, C columns of a tile.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

# Compiling takes seconds, so its results are kept. numba itself only looks at the file of the outermost function to
# see whether they are up to date.
_HERE = Path(__file__).parent
_SHARED = b"".join((_HERE / name).read_bytes() for name in ("intrinsics.py", "tiles.py"))
CACHE = os.access(_HERE, os.W_OK)
if CACHE:
    numba.config.CACHE_DIR = str(_HERE / "__pycache__" / hashlib.blake2b(_SHARED, digest_size=8).hexdigest())

_INT, _BIT32, _FLOAT = ir.IntType(64), ir.IntType(32), ir.FloatType()
_LANES = 8  # a register of AVX2, two of NEON
_STEP = 2 * _LANES  # floats of a cache line
PANEL = 2 * _LANES  # rows of a panel
_VECTOR = ir.VectorType(_FLOAT, _LANES)


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
        return builder.bitcast(arguments[0], _FLOAT)

    return types.float32(types.int32), generate


@intrinsic
def prefetch(typing_context: Any, address: Any) -> Any:
    """Begins to bring the cache line at this address into the cache; any address is allowed."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _BIT32, _BIT32, _BIT32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        read, keep, data = _BIT32(0), _BIT32(3), _BIT32(1)
        builder.call(function, [builder.inttoptr(arguments[0], byte), read, keep, data])
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
        emit = _Emitter(builder)
        x, x_stride, w, w_stride, y, y_stride, width = arguments[2:]
        xs, ws = [emit.place(x, x_stride, r) for r in tile_r], [emit.place(w, w_stride, c) for c in tile_c]
        vectors = [[emit.variable(_VECTOR) for _ in tile_c] for _ in tile_r]
        with emit.loop(emit.number(0), emit.whole_steps(width), _STEP) as d:
            for part in (0, _LANES):
                columns_d = [emit.load(_VECTOR, at, d, part) for at in ws]
                for r in tile_r:
                    row_d = emit.load(_VECTOR, xs[r], d, part)
                    for c in tile_c:
                        emit.fma(vectors[r][c], row_d, columns_d[c])
        sums = [[emit.variable(_FLOAT, emit.total(vectors[r][c])) for c in tile_c] for r in tile_r]
        with emit.loop(emit.whole_steps(width), width, 1) as d:
            for r in tile_r:
                for c in tile_c:
                    emit.fma(sums[r][c], emit.load(_FLOAT, xs[r], d), emit.load(_FLOAT, ws[c], d))
        for r in tile_r:
            for c in tile_c:
                emit.store(builder.load(sums[r][c]), emit.place(y, y_stride, r), emit.number(c))
        return context.get_dummy_value()

    return types.void(rows, columns, *[types.int64] * 7), generate


@intrinsic(prefer_literal=True)
def panel_tile(
    typing_context: Any, columns: Any, panel: Any, w: Any, w_stride: Any, y: Any, y_stride: Any, width: Any
) -> Any:
    """y[r, c] = x[r] . w[c] for a literal number of columns and PANEL rows, interleaved: x[r, d] is panel[d, r].

    Nothing is summed over lanes, which is what a dot_tile spends an eighth of its time on.
    """
    if not isinstance(columns, types.IntegerLiteral):
        return None
    tile_c, parts = range(columns.literal_value), range(0, PANEL, _LANES)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = _Emitter(builder)
        panel, w, w_stride, y, y_stride, width = arguments[1:]
        ws = [emit.place(w, w_stride, c) for c in tile_c]
        sums = [[emit.variable(_VECTOR) for _ in parts] for _ in tile_c]
        with emit.loop(emit.number(0), width, 1) as d:
            first = builder.mul(d, emit.number(PANEL))
            rows_d = [emit.load(_VECTOR, panel, first, part) for part in parts]
            for c in tile_c:
                column_d = emit.spread(_VECTOR, emit.load(_FLOAT, ws[c], d))
                for row_d, total in zip(rows_d, sums[c], strict=True):
                    emit.fma(total, row_d, column_d)
        for c in tile_c:
            for part, total in zip(parts, sums[c], strict=True):
                vector = builder.load(total)
                for lane in range(_LANES):
                    value = builder.extract_element(vector, ir.Constant(_BIT32, lane))
                    emit.store(value, emit.place(y, y_stride, part + lane), emit.number(c))
        return context.get_dummy_value()

    return types.void(columns, *[types.int64] * 6), generate


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
        emit = _Emitter(builder)
        p, p_stride, v, v_stride, count, y, y_stride, width = arguments[1:]
        ps, ys = [emit.place(p, p_stride, r) for r in tile_r], [emit.place(y, y_stride, r) for r in tile_r]

        def add(kind: ir.Type, parts: tuple[int, ...], d: Any) -> None:
            sums = [[emit.variable(kind, emit.load(kind, ys[r], d, part)) for part in parts] for r in tile_r]
            with emit.loop(emit.number(0), count, 1) as i:
                at = builder.add(v, builder.mul(i, v_stride))
                values = [emit.load(kind, at, d, part) for part in parts]
                for r in tile_r:
                    weight = emit.spread(kind, emit.load(_FLOAT, ps[r], i))
                    for k in range(len(parts)):
                        emit.fma(sums[r][k], weight, values[k])
            for r in tile_r:
                for k, part in enumerate(parts):
                    emit.store(builder.load(sums[r][k]), ys[r], d, part)

        with emit.loop(emit.number(0), emit.whole_steps(width), _STEP) as d:
            add(_VECTOR, (0, _LANES), d)
        with emit.loop(emit.whole_steps(width), width, 1) as d:
            add(_FLOAT, (0,), d)
        return context.get_dummy_value()

    return types.void(rows, *[types.int64] * 8), generate


class _Emitter:
    """Words of the tiles' code, for floats and vectors alike."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder

    def number(self, value: int) -> ir.Constant:
        return ir.Constant(_INT, value)

    def place(self, base: Any, stride: Any, index: int) -> Any:
        return self._builder.add(base, self._builder.mul(stride, self.number(index)))

    def whole_steps(self, width: Any) -> Any:
        return self._builder.and_(width, self.number(-_STEP))

    def loop(self, start: Any, stop: Any, step: int) -> Any:
        return _counter(cgutils.for_range_slice(self._builder, start, stop, self.number(step), _INT))

    def variable(self, kind: ir.Type, value: Any = None) -> Any:
        """A variable with this value or zero; LLVM turns it into a register."""
        made = cgutils.alloca_once(self._builder, kind)
        self._builder.store(ir.Constant(kind, None) if value is None else value, made)
        return made

    def _pointer(self, kind: ir.Type, base: Any, index: Any, part: int) -> Any:
        floats = self._builder.add(index, self.number(part))
        at = self._builder.add(base, self._builder.mul(floats, self.number(4)))
        return self._builder.inttoptr(at, kind.as_pointer())

    def load(self, kind: ir.Type, base: Any, index: Any, part: int = 0) -> Any:
        """What is `index` + `part` floats behind `base`."""
        return self._builder.load(self._pointer(kind, base, index, part), align=4)

    def store(self, value: Any, base: Any, index: Any, part: int = 0) -> None:
        self._builder.store(value, self._pointer(value.type, base, index, part), align=4)

    def spread(self, kind: ir.Type, value: Any) -> Any:
        """The float in every lane."""
        if kind is _FLOAT:
            return value
        undefined = ir.Constant(kind, ir.Undefined)
        first = self._builder.insert_element(undefined, value, ir.Constant(_BIT32, 0))
        return self._builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_BIT32, _LANES), None))

    def fma(self, total: Any, a: Any, b: Any) -> None:
        """total += a * b."""
        builder = self._builder
        name = "llvm.fma.f32" if a.type is _FLOAT else f"llvm.fma.v{_LANES}f32"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(a.type, [a.type] * 3), name)
        builder.store(builder.call(function, [a, b, builder.load(total)]), total)

    def total(self, vector: Any) -> Any:
        """The sum over a vector variable's lanes."""
        builder, kind = self._builder, ir.FunctionType(_FLOAT, [_FLOAT, _VECTOR])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{_LANES}f32")
        zero = ir.Constant(_FLOAT, -0.0)
        return builder.call(function, [zero, builder.load(vector)], fastmath=("reassoc",))


@contextmanager
def _counter(loop: Any) -> Iterator[Any]:
    with loop as (index, _):
        yield index
