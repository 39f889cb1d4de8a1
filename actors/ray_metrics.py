"""Herder's series through ray.util.metrics: Ray's agent of each node exports them, every ten seconds if not told else.

Recording goes to memory of this process. What is counted per token or per layer is counted where it happens, in plain
numbers, and handed over here once in a while (`report_*`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ray.util.metrics import Counter, Gauge, Histogram

from actors import series
from actors.series import Series
from engine.request import EngineLoad

if TYPE_CHECKING:
    from actors.timed_dispatcher import TimedDispatcher
    from dispatch.all_to_all import DispatchStats

_EVERY_S = 2.0  # more often than Ray exports
_LEAST = 5e-324  # the smallest number there is: it adds nothing to any count


class RayMetrics:
    """One process's series; made when they are first recorded. Each is for one thread at a time."""

    def __init__(self) -> None:
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        self._totals: dict[tuple[str, tuple[str, ...]], float] = {}

    def add(self, which: Series, amount: float, *labels: str) -> None:
        """Adds to a counter; with 0 the series begins to be there."""
        if which.name not in self._counters:
            self._counters[which.name] = Counter(which.name, which.help, which.labels)
        # Ray refuses 0, and a series that is not there cannot be told from a process that is not.
        self._counters[which.name].inc(amount or _LEAST, _tags(which, labels))

    def set_total(self, which: Series, total: float, *labels: str) -> None:
        """Brings a counter to `total`, which somebody else keeps; one that has fallen has begun anew."""
        before = self._totals.get((which.name, labels))
        if before is None or total != before:
            self._totals[which.name, labels] = total
            self.add(which, total - before if before is not None and total >= before else total, *labels)

    def set(self, which: Series, value: float, *labels: str) -> None:
        """Sets a gauge."""
        if which.name not in self._gauges:
            self._gauges[which.name] = Gauge(which.name, which.help, which.labels)
        self._gauges[which.name].set(value, _tags(which, labels))

    def observe(self, which: Series, value: float, *labels: str) -> None:
        """Adds one observation to a histogram."""
        if which.name not in self._histograms:
            self._histograms[which.name] = Histogram(which.name, which.help, list(which.buckets), which.labels)
        self._histograms[which.name].observe(value, _tags(which, labels))


def _tags(which: Series, labels: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(which.labels, labels, strict=True))


async def report_regularly(report: Callable[[], None]) -> None:
    """Reports until it is cancelled."""
    while True:
        report()
        await asyncio.sleep(_EVERY_S)


def report_engine(metrics: RayMetrics, engine: str, load: EngineLoad) -> None:
    """An engine's load as it is now."""
    for which, value in series.ENGINE:
        record = metrics.set_total if which.kind == "counter" else metrics.set
        record(which, value(load), engine)
    for kind, total in load.kv_pages_total.items():
        metrics.set(series.KV_USAGE, load.kv_pages_used.get(kind, 0) / total, engine, kind)
        metrics.set(series.KV_PREFIX, load.kv_pages_cached.get(kind, 0) / total, engine, kind)


def report_transport(metrics: RayMetrics, engine: str, timed: TimedDispatcher, stats: DispatchStats) -> None:
    """What an engine has sent to experts and had back. `stats` may begin anew, as with each epoch of a collective."""
    metrics.set_total(series.DISPATCH_SECONDS, timed.dispatch_s, engine)
    metrics.set_total(series.COMBINE_SECONDS, timed.combine_s, engine)
    metrics.set_total(series.BYTES_SENT, stats.bytes_sent, engine)
    metrics.set_total(series.BYTES_RECEIVED, stats.bytes_received, engine)


def report_rows(
    metrics: RayMetrics, slot: int, rows: Mapping[int, tuple[int, ...]], held: Mapping[int, tuple[int, ...]]
) -> None:
    """The rows that a slot has computed: layer -> a number for each expert; and the experts that it holds by layer."""
    here = {expert for experts in held.values() for expert in experts}
    for expert, counts in enumerate(zip(*rows.values(), strict=True)):
        if expert in here:  # a series for each pair of slot and expert would be too many
            # Three digits, so that names in their order are numbers in theirs.
            metrics.set_total(series.EXPERT_ROWS, sum(counts), str(slot), f"{expert:03d}")


def report_cluster(metrics: RayMetrics, ready: bool, epoch: int, failovers: int, balancedness: float) -> None:
    """What the controller knows; see ClusterStatus."""
    metrics.set(series.READY, float(ready))
    metrics.set(series.EPOCH, epoch)
    metrics.set_total(series.FAILOVERS, failovers)
    metrics.set(series.BALANCEDNESS, balancedness)
