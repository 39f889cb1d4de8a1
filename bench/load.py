"""What an open-loop load test asks, when it asks it, and what its answers' timing says. Pure: no network."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.common import Cell, percentile

Prompt = str | list[int]


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: when it is due (seconds from the start), and what it asks."""

    at: float
    prompt: Prompt
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """Prompt and answer lengths in tokens, drawn evenly from low..high."""

    prompt_low: int
    prompt_high: int
    answer_low: int
    answer_high: int


@dataclass(frozen=True, slots=True)
class Timing:
    """One answer's timing, in seconds from when the request was *due*: a late start counts against the server."""

    first: float | None
    last: float
    tokens: int
    error: str | None = None

    @property
    def per_token(self) -> float | None:
        """Mean seconds from one token to the next; None with fewer than two."""
        if self.first is None or self.tokens < 2:
            return None
        return (self.last - self.first) / (self.tokens - 1)


def arrivals(rate: float | None, generator: random.Random) -> Iterator[float]:
    """A Poisson process's times; all at once without a rate."""
    at = 0.0
    while True:
        yield at
        at += generator.expovariate(rate) if rate else 0.0


def random_asks(count: int, rate: float | None, lengths: Lengths, vocabulary: int, seed: int) -> list[Ask]:
    """Prompts of random token ids; the same seed gives the same requests at the same times."""
    generator = random.Random(seed)
    asks = []
    for at, _ in zip(arrivals(rate, generator), range(count), strict=False):
        length = generator.randint(lengths.prompt_low, lengths.prompt_high)
        answer = generator.randint(lengths.answer_low, lengths.answer_high)
        asks.append(Ask(at, [generator.randrange(vocabulary) for _ in range(length)], answer))
    return asks


def asks_from_file(file: Path, count: int, rate: float | None, max_tokens: int, seed: int) -> list[Ask]:
    """From JSON lines {"prompt": text or token ids, "max_tokens": optional}, again from the top when they run out.

    Raises ValueError, naming the line, for one that is not of this form.
    """
    found: list[tuple[Prompt, int]] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            prompt, answer = entry["prompt"], int(entry.get("max_tokens", max_tokens))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file}:{number} must be a JSON object with a prompt: {error!r}") from None
        found.append((prompt, answer))
    if not found:
        raise ValueError(f"{file} has no prompts")
    times = arrivals(rate, random.Random(seed))
    return [Ask(next(times), *found[n % len(found)]) for n in range(count)]


def summary(timings: Sequence[Timing], elapsed: float, slo_first: float, slo_per_token: float) -> dict[str, Cell]:
    """Counts and rates. Goodput is of requests that kept both objectives (seconds)."""
    good = [timing for timing in timings if timing.error is None]
    kept = [
        timing
        for timing in good
        if timing.first is not None and timing.first <= slo_first and (timing.per_token or 0.0) <= slo_per_token
    ]
    tokens = sum(timing.tokens for timing in timings)
    return {
        "requests": len(timings),
        "errors": len(timings) - len(good),
        "seconds": elapsed,
        "requests/s": len(good) / elapsed,
        "tokens/s": tokens / elapsed,
        "goodput requests/s": len(kept) / elapsed,
        "within SLO %": 100 * len(kept) / len(timings),
    }


def latencies(timings: Sequence[Timing]) -> list[dict[str, Cell]]:
    """Percentiles in milliseconds, of the answers without an error."""
    good = [timing for timing in timings if timing.error is None]
    series = {
        "first token": [timing.first for timing in good if timing.first is not None],
        "per output token": [timing.per_token for timing in good if timing.per_token is not None],
        "whole answer": [timing.last for timing in good],
    }
    return [
        {"ms": name} | {f"p{percent}": percentile(values, percent) * 1e3 for percent in (50, 90, 99)}
        for name, values in series.items()
    ]
