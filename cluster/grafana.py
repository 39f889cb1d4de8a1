"""The Grafana dashboard, over what Ray exports of every process (`ray_herder_…`). Pure.

Panels that stand side by side are a row of the grid, which is 24 wide. A query of a rate uses Grafana's own interval.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

DASHBOARD_FILE = "herder-dashboard.json"
_SCHEMA = 39  # Grafana 11's; later ones read it
_HEIGHT = 8
_WIDTH = 24
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Query:
    """`legend` may use labels, as {{engine}}."""

    expression: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """`unit` is one of Grafana's names; `kind` of its visualisations."""

    title: str
    queries: tuple[Query, ...]
    unit: str = "short"
    kind: Literal["timeseries", "stat", "heatmap"] = "timeseries"
    about: str = ""


def _rate(series: str, by: str = "") -> str:
    grouped = f"sum by ({by})" if by else "sum"
    return f"{grouped} (rate(ray_herder_{series}[$__rate_interval]))"


def _quantiles(series: str) -> tuple[Query, ...]:
    buckets = _rate(f"{series}_bucket", "le")
    return tuple(Query(f"histogram_quantile({q}, {buckets})", f"p{round(100 * q)}") for q in (0.5, 0.95, 0.99))


def _engines(series: str, legend: str) -> Query:
    return Query(f"sum (ray_herder_{series})", legend)


_STEPS = _rate("engine_steps_total", "engine")
_HITS, _COMPUTED = _rate("engine_cached_tokens_total"), _rate("engine_prompt_tokens_total")
_SHOWN, _ENCODED = _rate("vision_cached_images_total"), _rate("vision_images_total")

ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Now",
        (
            Panel("Ready", (Query("max (ray_herder_ready)"),), kind="stat", about="1: a request sent now is answered."),
            Panel("Engines", (Query("count (count by (engine) (ray_herder_requests_running))"),), kind="stat"),
            Panel("Epoch", (Query("max (ray_herder_epoch)"),), kind="stat"),
            Panel("Failovers", (Query("sum (ray_herder_failovers_total)"),), kind="stat"),
            Panel("Balancedness", (Query("max (ray_herder_expert_balancedness)"),), kind="stat"),
        ),
    ),
    (
        "Requests",
        (
            Panel(
                "Requests in the engines",
                (
                    _engines("requests_running", "running"),
                    _engines("requests_waiting", "waiting"),
                    _engines("requests_parked", "parked"),
                ),
            ),
            Panel("Requests ended", (Query(_rate("requests_total", "reason"), "{{reason}}"),), "reqps"),
            Panel(
                "Throughput",
                (
                    Query(_rate("engine_generation_tokens_total"), "generated"),
                    Query(_COMPUTED, "of prompts, computed"),
                    Query(_HITS, "of prompts, from the prefix cache"),
                ),
                "tokens/s",
            ),
        ),
    ),
    (
        "Latency",
        (
            Panel("Time to the first token", _quantiles("time_to_first_token_seconds"), "s"),
            Panel("Time per output token", _quantiles("time_per_output_token_seconds"), "s"),
            Panel("Whole request", _quantiles("e2e_request_latency_seconds"), "s"),
        ),
    ),
    (
        "KV cache",
        (
            Panel(
                "KV pages in use",
                (Query("max by (engine, layer_kind) (ray_herder_kv_cache_usage)", "{{engine}} {{layer_kind}}"),),
                "percentunit",
            ),
            Panel(
                "KV pages of the prefix cache alone",
                (Query("max by (engine, layer_kind) (ray_herder_kv_cache_prefix)", "{{engine}} {{layer_kind}}"),),
                "percentunit",
            ),
            Panel(
                "Prefix hit rate", (Query(f"{_HITS} / ({_HITS} + {_COMPUTED})", "of prompts' tokens"),), "percentunit"
            ),
            Panel("Preemptions", (Query(_rate("preemptions_total", "engine"), "{{engine}}"),), "reqps"),
        ),
    ),
    (
        "Experts",
        (
            Panel(
                "Load per expert",
                (Query(_rate("expert_rows_total", "expert"), "{{expert}}"),),
                "rows/s",
                "heatmap",
                "Rows computed for each expert, all layers and all its holders together.",
            ),
            Panel("Load per slot", (Query(_rate("expert_rows_total", "slot"), "slot {{slot}}"),), "rows/s"),
            Panel(
                "Balancedness",
                (Query("max (ray_herder_expert_balancedness)", "highest load of a slot over the mean"),),
                about="1 is even, 0 not known yet.",
            ),
        ),
    ),
    (
        "Between attention and experts",
        (
            Panel(
                "Time of a step in dispatch and combine",
                (
                    Query(f"{_rate('dispatch_seconds_total', 'engine')} / {_STEPS}", "{{engine}} dispatch"),
                    Query(f"{_rate('combine_seconds_total', 'engine')} / {_STEPS}", "{{engine}} combine"),
                ),
                "s",
            ),
            Panel(
                "Rows on the way",
                (
                    Query(_rate("dispatch_sent_bytes_total", "engine"), "{{engine}} sent"),
                    Query(_rate("dispatch_received_bytes_total", "engine"), "{{engine}} received"),
                ),
                "Bps",
            ),
            Panel(
                "Failovers and epochs",
                (
                    Query("sum (ray_herder_failovers_total)", "lost actors"),
                    Query("max (ray_herder_epoch)", "epoch"),
                ),
            ),
        ),
    ),
    (
        "Images",
        (
            Panel("Queue of the encoders", (Query("sum (ray_herder_vision_images_running)", "images"),)),
            Panel(
                "Images and tiles encoded",
                (Query(_ENCODED, "images"), Query(_rate("vision_tiles_total"), "tiles")),
                "ops",
            ),
            Panel("Encoded already", (Query(f"{_SHOWN} / ({_SHOWN} + {_ENCODED})", "of images"),), "percentunit"),
            Panel("Time of a batch in the encoder", _quantiles("vision_encode_seconds"), "s"),
        ),
    ),
)


def dashboard() -> str:
    """The dashboard's JSON, as Grafana imports or provisions it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        header = {"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": _place(0, y, _WIDTH, 1)}
        height = _HEIGHT // 2 if all(panel.kind == "stat" for panel in row) else _HEIGHT
        panels += [header, *_side_by_side(row, y + 1, height)]
        y += 1 + height
    source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    whole = {
        "title": "Herder",
        "uid": "herder",
        "tags": ["herder", "ray"],
        "schemaVersion": _SCHEMA,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [source]},
        "annotations": {"list": []},
        "panels": [panel | {"id": number} for number, panel in enumerate(panels, 1)],
    }
    return json.dumps(whole, indent=2) + "\n"


def _side_by_side(row: Sequence[Panel], y: int, height: int) -> list[dict[str, Any]]:
    edges = [_WIDTH * n // len(row) for n in range(len(row) + 1)]
    return [
        _panel(panel) | {"gridPos": _place(left, y, right - left, height)}
        for panel, left, right in zip(row, edges, edges[1:], strict=False)
    ]


def _place(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def _panel(panel: Panel) -> dict[str, Any]:
    targets = [
        {
            "refId": chr(ord("A") + n),
            "datasource": _SOURCE,
            "expr": query.expression,
            "legendFormat": query.legend,
            "instant": panel.kind == "stat",
            "range": panel.kind != "stat",
        }
        for n, query in enumerate(panel.queries)
    ]
    options: dict[str, dict[str, Any]] = {
        "timeseries": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "stat": {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "none"},
        "heatmap": {  # each series, named by its legend, is one row of cells
            "calculate": False,
            "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64},
            "yAxis": {"axisPlacement": "left", "unit": "none"},
            "cellGap": 1,
            "tooltip": {"mode": "single", "yHistogram": False},
        },
    }
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": _SOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "options": options[panel.kind],
    }
