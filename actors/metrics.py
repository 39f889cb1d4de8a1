"""What a gateway measures of its requests, and what it can say of the engines, as Prometheus text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from actors import series
from actors.series import Series
from actors.status import ClusterStatus
from engine.request import EngineLoad, FinishReason

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Recorder(Protocol):
    """Where a gateway's series go."""

    def add(self, which: Series, amount: float, *labels: str) -> None:
        """Adds to a counter; with 0 the series begins to be there."""

    def observe(self, which: Series, value: float, *labels: str) -> None:
        """Adds one observation to a histogram."""


class GatewayMetrics:
    """Counters and histograms of the requests that came through one gateway. Not for several threads.

    `elsewhere` gets all that /metrics shows of them: behind a proxy, each scrape of /metrics comes to some gateway, so
    with several of them only what each process exports itself adds up.
    """

    def __init__(
        self, model: str, clock: Callable[[], float] = time.monotonic, elsewhere: Recorder | None = None
    ) -> None:
        self._clock = clock
        self._model = model
        self._page = _Page()
        self._recorders: tuple[Recorder, ...] = (self._page,) if elsewhere is None else (self._page, elsewhere)
        self.under_way = 0
        for reason in FinishReason:
            self._add(series.REQUESTS, 0, reason.lower())
        for which in (series.PROMPT_TOKENS, series.CACHED_TOKENS, series.GENERATED_TOKENS):
            self._add(which, 0)

    def begin(self, prompt_tokens: int) -> RequestRecord:
        """A request was accepted."""
        self.under_way += 1
        self._add(series.PROMPT_TOKENS, prompt_tokens)
        return RequestRecord(self, self._clock)

    def text(self, status: ClusterStatus | None) -> bytes:
        """Everything, with the engines' load if `status` is there."""
        engines = CollectorRegistry()
        engines.register(_EngineCollector(status))
        return generate_latest(self._page.registry) + generate_latest(engines)

    def image_waited(self, seconds: float) -> None:
        """A request with images had its turn after so long."""
        self._observe(series.IMAGE_WAIT, seconds)

    def first_token(self, seconds: float) -> None:
        self._observe(series.FIRST_TOKEN, seconds)

    def end(self, reason: str, seconds: float, generated: int, cached: int, per_token: float | None) -> None:
        self.under_way -= 1
        self._add(series.REQUESTS, 1, reason.lower())
        self._add(series.GENERATED_TOKENS, generated)
        self._add(series.CACHED_TOKENS, cached)
        self._observe(series.WHOLE_REQUEST, seconds)
        if per_token is not None:
            self._observe(series.PER_TOKEN, per_token)

    def _add(self, which: Series, amount: float, *labels: str) -> None:
        for recorder in self._recorders:
            recorder.add(which, amount, self._model, *labels)

    def _observe(self, which: Series, value: float) -> None:
        for recorder in self._recorders:
            recorder.observe(which, value, self._model)


class RequestRecord:
    """One request's times and tokens, on their way into the metrics."""

    def __init__(self, metrics: GatewayMetrics, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._clock = clock
        self._started = clock()
        self._first: float | None = None
        self._last = self._started
        self.generated = 0
        self.cached = 0

    @property
    def seconds(self) -> float:
        """Since it was accepted."""
        return self._clock() - self._started

    def add(self, tokens: int, cached: int) -> None:
        """`tokens` were generated; `cached` ones of the prompt were in the prefix cache."""
        self.cached += cached
        if not tokens:
            return
        self._last = self._clock()
        if self._first is None:
            self._first = self._last
            self._metrics.first_token(self._first - self._started)
        self.generated += tokens

    def end(self, reason: str) -> None:
        per_token = None
        if self._first is not None and self.generated > 1:
            per_token = (self._last - self._first) / (self.generated - 1)
        self._metrics.end(reason, self.seconds, self.generated, self.cached, per_token)


class _Page:
    """The recorder behind /metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        for which in series.GATEWAY:
            if which.kind == "histogram":
                self._histograms[which.name] = Histogram(
                    which.name, which.help, which.labels, buckets=which.buckets, registry=self.registry
                )
            else:
                self._counters[which.name] = Counter(which.name, which.help, which.labels, registry=self.registry)

    def add(self, which: Series, amount: float, *labels: str) -> None:
        self._counters[which.name].labels(*labels).inc(amount)

    def observe(self, which: Series, value: float, *labels: str) -> None:
        self._histograms[which.name].labels(*labels).observe(value)


class _EngineCollector:
    """Load of the engines, as they say at the time of the scrape."""

    def __init__(self, status: ClusterStatus | None) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status
        yield _whole(series.READY, float(status is not None and status.ready))
        if status is None:
            return
        yield from _cluster(status)
        for which, value in series.ENGINE:
            family = _family(which)
            for engine, load in status.engines.items():
                family.add_metric((engine,), value(load))
            yield family
        used, cached = _family(series.KV_USAGE), _family(series.KV_PREFIX)
        for engine, load in status.engines.items():
            for kind, total in load.kv_pages_total.items():
                used.add_metric((engine, kind), load.kv_pages_used.get(kind, 0) / total)
                cached.add_metric((engine, kind), load.kv_pages_cached.get(kind, 0) / total)
        yield used
        yield cached


def _cluster(status: ClusterStatus) -> Iterator[Metric]:
    yield _whole(series.EPOCH, status.epoch)
    yield _whole(series.FAILOVERS, status.failovers)
    yield _whole(series.BALANCEDNESS, status.balancedness)
    if status.seconds_since_move is not None:
        yield _whole(series.BALANCEDNESS_BEFORE, status.balancedness_before)
        yield _whole(series.SINCE_MOVE, status.seconds_since_move)
    loads = status.engines.values()
    yield _whole(series.QUEUED, sum(load.waiting for load in loads))
    yield _whole(series.RUNNING, sum(load.running for load in loads))
    if loads:
        yield _whole(series.KV_UTILISATION, sum(map(_fullest_pool, loads)) / len(loads))


def _fullest_pool(load: EngineLoad) -> float:
    return max((load.kv_pages_used.get(kind, 0) / total for kind, total in load.kv_pages_total.items()), default=0.0)


def _family(which: Series) -> CounterMetricFamily | GaugeMetricFamily:
    family = CounterMetricFamily if which.kind == "counter" else GaugeMetricFamily
    return family(which.name, which.help, labels=which.labels)


def _whole(which: Series, value: float) -> Metric:
    family = _family(which)
    family.add_metric((), value)
    return family
