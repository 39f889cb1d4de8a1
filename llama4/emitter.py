"""Words of the code that `intrinsics` emits, for floats and vectors alike: LLVM's, by llvmlite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba.core import cgutils

INT, BIT32, FLOAT32 = ir.IntType(64), ir.IntType(32), ir.FloatType()
LANES = 8  # a register of AVX2, two of NEON
STEP = 2 * LANES  # floats of a cache line
LEAST_EXPONENT = -87.0  # the least for `exp`, which takes smaller ones for it


class Emitter:
    """Emits at a builder's place. Addresses count bytes, indices floats."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder

    def number(self, value: int) -> ir.Constant:
        return ir.Constant(INT, value)

    def place(self, base: Any, stride: Any, index: Any) -> Any:
        number = self.number(index) if isinstance(index, int) else index
        return self._builder.add(base, self._builder.mul(stride, number))

    def address(self, base: Any, index: Any) -> Any:
        """Of what is `index` floats behind `base`."""
        return self._builder.add(base, self._builder.mul(index, self.number(4)))

    def whole_steps(self, width: Any) -> Any:
        return self._builder.and_(width, self.number(-STEP))

    def prefetch(self, at: Any, nearness: int = 3, writing: bool = False) -> None:
        """`nearness`: of the cache that the line goes to, up to 3, the nearest."""
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, BIT32, BIT32, BIT32])
        function = cgutils.get_or_insert_function(self._builder.module, kind, "llvm.prefetch.p0i8")
        read, keep, data = BIT32(int(writing)), BIT32(nearness), BIT32(1)
        self._builder.call(function, [self._builder.inttoptr(at, byte), read, keep, data])

    def least(self, a: Any, b: Any) -> Any:
        return self._builder.select(self._builder.icmp_signed("<", a, b), a, b)

    def loop(self, start: Any, stop: Any, step: int) -> Any:
        return _counter(cgutils.for_range_slice(self._builder, start, stop, self.number(step), INT))

    def variable(self, kind: ir.Type, value: Any = None) -> Any:
        """A variable with this value or zero; LLVM turns it into a register."""
        made = cgutils.alloca_once(self._builder, kind)
        self._builder.store(ir.Constant(kind, None) if value is None else value, made)
        return made

    def _pointer(self, kind: ir.Type, base: Any, index: Any, part: int) -> Any:
        at = self.address(base, self._builder.add(index, self.number(part)))
        return self._builder.inttoptr(at, kind.as_pointer())

    def load(self, kind: ir.Type, base: Any, index: Any, part: int = 0) -> Any:
        """What is `index` + `part` floats behind `base`."""
        return self._builder.load(self._pointer(kind, base, index, part), align=4)

    def store(self, value: Any, base: Any, index: Any, part: int = 0) -> None:
        self._builder.store(value, self._pointer(value.type, base, index, part), align=4)

    def spread(self, kind: ir.Type, value: Any) -> Any:
        """The number in every lane."""
        if kind is FLOAT32:
            return value
        undefined = ir.Constant(kind, ir.Undefined)
        first = self._builder.insert_element(undefined, value, ir.Constant(BIT32, 0))
        return self._builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(BIT32, kind.count), None))

    def vector(self, values: list[Any]) -> Any:
        """These floats, side by side."""
        made = ir.Constant(ir.VectorType(FLOAT32, len(values)), ir.Undefined)
        for lane, value in enumerate(values):
            made = self._builder.insert_element(made, value, BIT32(lane))
        return made

    def lanes(self, vector: Any, first: int, count: int) -> Any:
        """So many of a vector's lanes, from this one on."""
        chosen = ir.Constant(ir.VectorType(BIT32, count), list(range(first, first + count)))
        return self._builder.shuffle_vector(vector, vector, chosen)

    def transposed(self, rows: list[Any]) -> list[Any]:
        """The columns of a square: rows of the first half are interleaved with those of the second, again and again."""
        count = half = len(rows)
        while half > 1:
            half //= 2
            pairs = [(rows[i], rows[i + count // 2]) for i in range(count // 2)]
            rows = [self._interleaved(a, b, first) for a, b in pairs for first in (0, count // 2)]
        return rows

    def _interleaved(self, a: Any, b: Any, first: int) -> Any:
        """The lanes of two vectors in turn, from a half's first on."""
        count = a.type.count
        chosen = [lane + other for lane in range(first, first + count // 2) for other in (0, count)]
        return self._builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(BIT32, count), chosen))

    def fma(self, total: Any, a: Any, b: Any) -> None:
        """total += a * b."""
        builder = self._builder
        name = "llvm.fma.f32" if a.type is FLOAT32 else f"llvm.fma.v{a.type.count}f32"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(a.type, [a.type] * 3), name)
        builder.store(builder.call(function, [a, b, builder.load(total)]), total)

    def add(self, total: Any, value: Any) -> None:
        """total += value."""
        self._builder.store(self._builder.fadd(self._builder.load(total), value), total)

    def all(self, kind: ir.VectorType, value: float) -> Any:
        """A constant in every lane."""
        return ir.Constant(kind, [value] * kind.count)

    def greater(self, a: Any, b: Any) -> Any:
        return self._builder.select(self._builder.fcmp_ordered(">", a, b), a, b)

    def exp(self, x: Any) -> Any:
        """Of a vector, x <= 0, to two units in the last place: 2^n times a Taylor polynomial of what is left over."""
        builder, kind = self._builder, x.type
        whole = ir.VectorType(BIT32, kind.count)

        def product(a: Any, factor: float, summand: Any) -> Any:
            total = self.variable(kind, summand)
            self.fma(total, a, self.all(kind, factor))
            return builder.load(total)

        x = self.greater(x, self.all(kind, LEAST_EXPONENT))
        n = builder.fptosi(product(x, 1 / math.log(2), self.all(kind, -0.5)), whole)
        n_float = builder.sitofp(n, kind)
        r = product(n_float, 2.1219444e-4, product(n_float, -0.693359375, x))
        series = self.all(kind, 1 / 720)
        for factor in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
            step = self.variable(kind, self.all(kind, factor))
            self.fma(step, series, r)
            series = builder.load(step)
        power = builder.shl(builder.add(n, self.all(whole, 127)), self.all(whole, 23))
        return builder.fmul(series, builder.bitcast(power, kind))

    def total(self, vector: Any) -> Any:
        """The sum over a vector variable's lanes, in the order of `tree`."""
        return self._folded(self._builder.load(vector), self._builder.fadd)

    def largest(self, vector: Any) -> Any:
        """The largest of a vector's lanes."""
        return self._folded(vector, self.greater)

    def _folded(self, value: Any, combine: Callable[[Any, Any], Any]) -> Any:
        left = value.type.count
        while left > 1:
            left //= 2
            value = combine(self.lanes(value, 0, left), self.lanes(value, left, left))
        return self._builder.extract_element(value, BIT32(0))

    def tree(self, values: list[Any]) -> Any:
        """Their sum, always in the same order: halves onto each other."""
        while len(values) > 1:
            half = len(values) // 2
            values = [self._builder.fadd(a, b) for a, b in zip(values[:half], values[half:], strict=True)]
        return values[0]


@contextmanager
def _counter(loop: Any) -> Iterator[Any]:
    with loop as (index, _):
        yield index
