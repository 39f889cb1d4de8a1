"""Whether a step is computed whole, or as two micro-batches of which one is with the experts while the other attends.

Two hide the experts' time, but every weight is read twice. What that gains or costs depends on the machines, their
network and the number of rows, so `auto` measures it.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeVar

_TRIALS = 8  # of each way
_KEPT = 1000  # steps until both are tried again

Found = TypeVar("Found")


@dataclass(slots=True)
class _Choice:
    """`seconds_per_row`: of the trials since the last decision, by number of micro-batches."""

    seconds_per_row: dict[int, list[float]] = field(default_factory=lambda: {1: [], 2: []})
    number: int = 1
    steps_left: int = 0


class MicroBatching:
    """Chooses the number of micro-batches of each step.

    auto: steps of one kind (decoding only or not) and size (to a power of two) are tried both ways in turn; the way
    with the smaller median time per row is kept for a thousand steps. A step of one sequence cannot be cut.
    """

    def __init__(self, wanted: Literal["auto", 1, 2], clock: Callable[[], float] = time.perf_counter) -> None:
        self._wanted = wanted
        self._clock = clock
        self._choices: defaultdict[tuple[bool, int], _Choice] = defaultdict(_Choice)

    def run(self, rows: int, sequences: int, compute: Callable[[int], Found]) -> Found:
        """`compute` of the number of micro-batches for a step of so many rows and sequences."""
        if sequences < 2:
            return compute(1)
        if self._wanted != "auto":
            return compute(self._wanted)
        choice = self._choices[rows == sequences, rows.bit_length()]
        if choice.steps_left:
            choice.steps_left -= 1
            return compute(choice.number)
        return self._try(choice, rows, compute)

    def _try(self, choice: _Choice, rows: int, compute: Callable[[int], Found]) -> Found:
        found = choice.seconds_per_row
        number = min(found, key=lambda number: len(found[number]))
        start = self._clock()
        result = compute(number)
        found[number].append((self._clock() - start) / rows)
        if len(found[2]) == _TRIALS:  # the last to be tried
            choice.number = min(found, key=lambda number: statistics.median(found[number]))
            choice.steps_left = _KEPT
            choice.seconds_per_row = {1: [], 2: []}
        return result
