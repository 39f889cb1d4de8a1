"""What `herder chaos` counts: answers that came whole, were lost or changed, and how long streams waited for tokens.

All times are seconds of one monotonic clock.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_TICK_S = 1e-4  # to which gaps are rounded for their median, so that a long run takes no more memory than a short one


@dataclass(slots=True)
class Harm:
    """One thing that was done to the deployment. `full_strength_after` None: it has not come back."""

    action: str
    actor: str
    at: float
    longest_gap: float = 0.0
    full_strength_after: float | None = None


class Tally:
    """Counts of some streams, numbered from 0. A gap is what a stream waited for its next token."""

    def __init__(self, streams: int) -> None:
        self.answers = 0  # whole and equal to the undisturbed ones
        self.tokens = 0
        self.lost: Counter[str] = Counter()  # by reason
        self.changed: list[str] = []  # a sentence for each
        self.harms: list[Harm] = []
        self.longest_gaps = [0.0] * streams
        self._ticks: Counter[int] = Counter()  # how many gaps, by length

    def note_answer(self, stream: int, tokens: Sequence[int], expected: Sequence[int]) -> None:
        """An answer that came to its end: compares it token by token."""
        self.tokens += len(tokens)
        if tuple(tokens) == tuple(expected):
            self.answers += 1
            return
        pairs = enumerate(zip(tokens, expected, strict=False))
        at = next((i for i, (got, wanted) in pairs if got != wanted), min(len(tokens), len(expected)))
        self.changed.append(f"stream {stream}: another token at {at} ({len(tokens)} tokens, not {len(expected)})")

    def note_gap(self, stream: int, start: float, end: float) -> None:
        """A stream waited from `start` to `end`."""
        length = end - start
        self._ticks[round(length / _TICK_S)] += 1
        self.longest_gaps[stream] = max(self.longest_gaps[stream], length)
        harm = self._cause(start, end)
        if harm is not None:
            harm.longest_gap = max(harm.longest_gap, length)

    def _cause(self, start: float, end: float) -> Harm | None:
        """The harm that a gap is put down to: of those between which it lies, the one it lies longest behind."""
        cause, longest = None, 0.0
        for harm in reversed(self.harms):
            behind = end - max(start, harm.at)
            if behind > longest:
                cause, longest = harm, behind
            if harm.at <= start:
                return cause
            end = min(end, harm.at)
        return cause if longest > end - start else None  # the rest lies before any harm

    @property
    def median_gap(self) -> float:
        """Of all gaps of all streams; 0 without any."""
        passed = 0
        for tick in sorted(self._ticks):
            passed += self._ticks[tick]
            if 2 * passed >= self._ticks.total():
                return tick * _TICK_S
        return 0.0

    @property
    def by_action(self) -> dict[str, list[Harm]]:
        """The harms of each action, actions by name."""
        return {
            action: [harm for harm in self.harms if harm.action == action]
            for action in sorted({harm.action for harm in self.harms})
        }


def spread(values: Sequence[float]) -> str:
    """Times in seconds: their median, and the longest if there are several."""
    if len(values) < 2:
        return ", ".join(map(duration, values)) or "-"
    return f"{duration(statistics.median(values))}, worst {duration(max(values))}"


def duration(seconds: float) -> str:
    """For people."""
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
