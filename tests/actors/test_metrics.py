"""What is handed to Ray, with Ray's metrics replaced by ones that remember; and the list of it in the documentation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from actors import ray_metrics, series
from actors.ray_metrics import RayMetrics, report_cluster, report_engine, report_rows, report_transport
from actors.series import Series
from actors.timed_dispatcher import TimedDispatcher
from cluster.grafana import ROWS
from dispatch.all_to_all import DispatchStats
from engine.request import EngineLoad

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
ENGINE = (*(which for which, _ in series.ENGINE), series.KV_USAGE, series.KV_PREFIX)
BY_RAY = (*series.GATEWAY, *ENGINE, *series.TRANSPORT, series.EXPERT_ROWS, *series.CLUSTER, *series.VISION)

Values = dict[tuple[str, ...], float]  # by name and labels


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> Values:
    """Where recorded values go; as Ray, it takes no count of zero and no other labels than those announced."""
    found: Values = {}

    class Fake:
        def __init__(self, name: str, help: str, *rest: Any) -> None:
            self.name, self.labels = name, rest[-1]

        def _key(self, tags: dict[str, str]) -> tuple[str, ...]:
            assert tuple(tags) == self.labels
            return self.name, *tags.values()

        def inc(self, amount: float, tags: dict[str, str]) -> None:
            assert amount > 0
            found[self._key(tags)] = found.get(self._key(tags), 0.0) + amount

        def set(self, value: float, tags: dict[str, str]) -> None:
            found[self._key(tags)] = value

    for name in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(ray_metrics, name, Fake)
    return found


def test_counters_follow_totals_that_may_begin_anew(values: Values) -> None:
    metrics = RayMetrics()
    for total, seen in ((0, 0), (5, 5), (5, 5), (8, 8), (2, 10), (3, 11)):  # 2: another epoch's group counts
        metrics.set_total(series.FAILOVERS, total)
        assert values["herder_failovers",] == pytest.approx(seen)
    assert values["herder_failovers",] == 11  # the zero at the beginning adds nothing at all


def test_an_engine_reports_all_of_its_series(values: Values) -> None:
    load = EngineLoad(
        waiting=1, running=2, parked=1, steps=7, prompt_tokens=30, generated_tokens=5, cached_prompt_tokens=16,
        kv_pages_used={"full": 2}, kv_pages_total={"full": 8, "chunked": 4}, kv_pages_cached={"chunked": 1},
    )  # fmt: skip
    metrics = RayMetrics()
    report_engine(metrics, "attention-0", load)
    report_engine(metrics, "attention-0", load)
    assert values["herder_requests_waiting", "attention-0"] == 1
    assert values["herder_engine_steps", "attention-0"] == 7
    assert values["herder_preemptions", "attention-0"] == pytest.approx(0)
    assert values["herder_kv_cache_usage", "attention-0", "full"] == 0.25
    assert values["herder_kv_cache_usage", "attention-0", "chunked"] == 0
    assert values["herder_kv_cache_prefix", "attention-0", "chunked"] == 0.25
    assert {key[0] for key in values} == {which.name for which in ENGINE}


def test_rows_are_summed_over_layers_for_what_the_slot_holds(values: Values) -> None:
    report_rows(RayMetrics(), 3, {0: (1, 0, 2, 0), 2: (4, 0, 1, 0)}, held={0: (0, 1), 2: (1, 2)})
    assert values == {
        ("herder_expert_rows", "3", "000"): 5,
        ("herder_expert_rows", "3", "001"): pytest.approx(0),
        ("herder_expert_rows", "3", "002"): 3,
    }


def test_the_cluster_reports_all_of_its_series(values: Values) -> None:
    report_cluster(RayMetrics(), True, 4, 2, 1.5)
    assert values == {(name,): value for name, value in zip(names(series.CLUSTER), (1, 4, 2, 1.5), strict=True)}


def test_time_is_counted_in_dispatch_and_in_combine(values: Values) -> None:
    times: Iterator[float] = iter([1.0, 1.5, 10.0, 14.0, 20.0, 20.25, 30.0, 30.5])

    class Echo:
        def dispatch(self, x_ND: torch.Tensor, expert_ids_NK: torch.Tensor, layer: int) -> torch.Tensor:
            return x_ND

        def combine(self, ticket: torch.Tensor) -> torch.Tensor:
            return ticket[:, None]

        def take_lost(self, num_tokens: int) -> frozenset[int]:
            return frozenset({num_tokens})

    timed = TimedDispatcher(Echo(), clock=lambda: next(times))
    x_ND = torch.ones(2, 3)
    for layer in (0, 1):
        assert timed.combine(timed.dispatch(x_ND, torch.zeros(2, 1), layer)).shape == (2, 1, 3)
    assert timed.take_lost(7) == {7}
    report_transport(RayMetrics(), "attention-1", timed, DispatchStats(bytes_sent=24, bytes_received=23))
    assert list(values.values()) == [0.75, 4.5, 24, 23]
    assert [key[0] for key in values] == names(series.TRANSPORT)


def test_the_document_has_a_row_for_each_series() -> None:
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `herder_")]
    assert rows == [row_of(which) for which in (*BY_RAY, *series.METRICS_ONLY)]


def row_of(which: Series) -> str:
    labels = ", ".join(f"`{label}`" for label in which.labels) or "none"
    return f"| `{which.name}` | {which.kind} | {labels} | {which.unit} | {which.help} |"


def names(which: tuple[Series, ...]) -> list[str]:
    return [one.name for one in which]


def test_the_dashboard_asks_for_series_that_there_are() -> None:
    suffix = {"counter": "_total", "gauge": "", "histogram": "_bucket"}
    known = {f"ray_{which.name}{suffix[which.kind]}" for which in BY_RAY}
    for panel in (panel for _, row in ROWS for panel in row):
        for query in panel.queries:
            asked = set(re.findall(r"ray_\w+", query.expression))
            assert asked and asked <= known, panel.title
