"""What a gateway measures of its requests, and what it can say of the engines, as Prometheus text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from actors.status import ClusterStatus
from engine.request import EngineLoad

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Seconds.
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80, 160)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5)
_WHOLE = (0.1, 0.3, 0.5, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 60, 120, 240, 480, 960, 1920)


class GatewayMetrics:
    """Counters and histograms of the requests that came through one gateway. Not for several threads."""

    def __init__(self, model: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._registry = registry = CollectorRegistry()
        labels, self._model = ("model",), model
        self._ended = Counter(
            "herder_requests", "Requests that have ended, by finish reason or error.", ("model", "reason"),
            registry=registry,
        )  # fmt: skip
        self._prompt = Counter("herder_prompt_tokens", "Tokens of prompts.", labels, registry=registry)
        self._cached = Counter(
            "herder_prompt_tokens_cached", "Those of them that the prefix cache had.", labels, registry=registry
        )
        self._generated = Counter("herder_generation_tokens", "Tokens generated.", labels, registry=registry)
        self._first_token = Histogram(
            "herder_time_to_first_token_seconds", "From a request's acceptance to its first token.", labels,
            buckets=_FIRST_TOKEN, registry=registry,
        )  # fmt: skip
        self._per_token = Histogram(
            "herder_time_per_output_token_seconds", "Between tokens after the first: the mean of each request.", labels,
            buckets=_PER_TOKEN, registry=registry,
        )  # fmt: skip
        self._whole = Histogram(
            "herder_e2e_request_latency_seconds", "From a request's acceptance to its end.", labels,
            buckets=_WHOLE, registry=registry,
        )  # fmt: skip
        self.under_way = 0

    def begin(self, prompt_tokens: int) -> RequestRecord:
        """A request was accepted."""
        self.under_way += 1
        self._prompt.labels(self._model).inc(prompt_tokens)
        return RequestRecord(self, self._clock)

    def text(self, status: ClusterStatus | None) -> bytes:
        """Everything, with the engines' load if `status` is there."""
        engines = CollectorRegistry()
        engines.register(_EngineCollector(status))
        return generate_latest(self._registry) + generate_latest(engines)

    def first_token(self, seconds: float) -> None:
        self._first_token.labels(self._model).observe(seconds)

    def end(self, reason: str, seconds: float, generated: int, cached: int, per_token: float | None) -> None:
        self.under_way -= 1
        self._ended.labels(self._model, reason.lower()).inc()
        self._generated.labels(self._model).inc(generated)
        self._cached.labels(self._model).inc(cached)
        self._whole.labels(self._model).observe(seconds)
        if per_token is not None:
            self._per_token.labels(self._model).observe(per_token)


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


class _EngineCollector:
    """Load of the engines, as they say at the time of the scrape."""

    def __init__(self, status: ClusterStatus | None) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status
        ready = status is not None and status.ready
        yield GaugeMetricFamily("herder_ready", "Whether a request sent now is answered.", value=float(ready))
        if status is None:
            return
        yield from _cluster_metrics(status)
        engines = status.engines
        for name, text, value in _GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=("engine",))
            for engine, load in engines.items():
                gauge.add_metric((engine,), value(load))
            yield gauge
        for name, text, value in _COUNTERS:
            counter = CounterMetricFamily(name, text, labels=("engine",))
            for engine, load in engines.items():
                counter.add_metric((engine,), value(load))
            yield counter
        used = GaugeMetricFamily(
            "herder_kv_cache_usage", "KV pages held by requests, of all (0 to 1).", labels=("engine", "layer_kind")
        )
        cached = GaugeMetricFamily(
            "herder_kv_cache_prefix", "KV pages held by the prefix cache alone, of all (0 to 1).",
            labels=("engine", "layer_kind"),
        )  # fmt: skip
        for engine, load in engines.items():
            for kind, total in load.kv_pages_total.items():
                used.add_metric((engine, kind), load.kv_pages_used.get(kind, 0) / total)
                cached.add_metric((engine, kind), load.kv_pages_cached.get(kind, 0) / total)
        yield used
        yield cached


def _cluster_metrics(status: ClusterStatus) -> Iterator[Metric]:
    yield GaugeMetricFamily("herder_epoch", "Counts the changes of actors and of their experts.", value=status.epoch)
    yield CounterMetricFamily("herder_failovers", "Lost actors that were replaced.", value=status.failovers)
    if status.balancedness:
        text = "Highest load of a slot, as a multiple of the mean."
        yield GaugeMetricFamily("herder_expert_balancedness", text, value=status.balancedness)
    if status.seconds_since_move is not None:
        text = "The same, just before experts were last moved."
        yield GaugeMetricFamily("herder_expert_balancedness_before", text, value=status.balancedness_before)
        text = "Since experts were last moved."
        yield GaugeMetricFamily("herder_expert_seconds_since_move", text, value=status.seconds_since_move)


_Value = Callable[[EngineLoad], float]
_GAUGES: tuple[tuple[str, str, _Value], ...] = (
    ("herder_requests_running", "Requests that are prefilling or decoding.", lambda load: load.running),
    ("herder_requests_parked", "Those of them that wait for a lost expert.", lambda load: load.parked),
    ("herder_requests_waiting", "Requests that wait for their first step.", lambda load: load.waiting),
)
_COUNTERS: tuple[tuple[str, str, _Value], ...] = (
    ("herder_engine_steps", "Steps.", lambda load: load.steps),
    ("herder_engine_prompt_tokens", "Tokens of prompts that were computed.", lambda load: load.prompt_tokens),
    ("herder_engine_cached_tokens", "Tokens of prompts from the prefix cache.", lambda load: load.cached_prompt_tokens),
    ("herder_engine_generation_tokens", "Tokens generated.", lambda load: load.generated_tokens),
    ("herder_preemptions", "Requests that gave their KV pages up for others.", lambda load: load.preemptions),
)
