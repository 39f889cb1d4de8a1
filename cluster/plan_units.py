"""Numbers for people: decimal units, three digits or so."""

from __future__ import annotations


def size(number: float) -> str:
    """Bytes.

    >>> [size(number) for number in (12, 4096, 217_283_587_072, 1_966_080_000_000)]
    ['12 B', '4.1 kB', '217.3 GB', '1.97 TB']
    """
    for unit, scale, digits in (("TB", 10**12, 2), ("GB", 10**9, 1), ("MB", 10**6, 1), ("kB", 10**3, 1)):
        if number >= scale:
            return f"{number / scale:,.{digits}f} {unit}"
    return f"{number:.0f} B"


def count(number: float) -> str:
    """How many, of parameters for one.

    >>> [count(number) for number in (7, 1_500, 2_500_000, 109_000_000_000)]
    ['7', '1.5 k', '2.5 M', '109.0 B']
    """
    for unit, scale in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= scale:
            return f"{number / scale:,.1f} {unit}"
    return f"{number:.0f}"


def flops(number: float) -> str:
    """Floating-point operations, where a unit counts from a tenth on.

    >>> [flops(number) for number in (960, 88_080_384, 251_658_240, 46_369_679_360)]
    ['0.96 kFLOPs', '88.1 MFLOPs', '0.25 GFLOPs', '46.4 GFLOPs']
    """
    units = (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3))
    unit, scale = next(((unit, scale) for unit, scale in units if number >= scale / 10), units[-1])
    return f"{number / scale:,.{1 if number >= 10 * scale else 2}f} {unit}FLOPs"
