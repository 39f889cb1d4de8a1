"""What Prometheus' operator needs to watch a deployment on Kubernetes: where to scrape, and what to alert on. Pure."""

from __future__ import annotations

from cluster.manifests_pods import API_KEYS_SECRET, NAME, Manifest, labels

_MONITORING = "monitoring.coreos.com/v1"
_INTERVAL = "15s"


def pod_monitors() -> list[Manifest]:
    """Ray's and Serve's metrics of every node, and Herder's own from the gateways, which ask for an API key."""
    nodes = {
        "selector": {"matchLabels": {"app": NAME}},
        "podMetricsEndpoints": [{"port": "metrics", "interval": _INTERVAL}],
    }
    key = {"type": "Bearer", "credentials": {"name": API_KEYS_SECRET, "key": "scrape-key"}}
    gateways = {
        "selector": {"matchLabels": labels("attention")},
        "podMetricsEndpoints": [
            {"port": "serve", "path": "/metrics", "interval": _INTERVAL, "authorization": key},
        ],
    }
    return [_object("PodMonitor", "herder-nodes", nodes), _object("PodMonitor", "herder-gateways", gateways)]


def alerts() -> Manifest:
    """Alerts on what every gateway says alike, since it is the controller's: whichever replica a scrape comes to."""
    rules = [
        _alert(
            "HerderNotReady", "max(herder_ready) == 0 or absent(herder_ready)", "2m", "critical",
            "No request is answered: /health/ready and `herder status` say why.",
        ),
        _alert(
            "HerderRequestsParked", "sum(max by (engine) (herder_requests_parked)) > 0", "2m", "critical",
            "Requests wait for experts that no living actor holds.",
        ),
        _alert(
            "HerderQueueGrows", "sum(max by (engine) (herder_requests_waiting)) > 100", "10m", "warning",
            "Requests wait for their first step: more attention actors, or fewer requests, are needed.",
        ),
        _alert(
            "HerderKvCacheFull", "max by (engine, layer_kind) (herder_kv_cache_usage) > 0.95", "10m", "warning",
            "The KV pages of {{ $labels.engine }} ({{ $labels.layer_kind }}) are in use: requests wait or give way.",
        ),
        _alert(
            "HerderActorsDie", "max(increase(herder_failovers_total[1h])) > 3", "0m", "warning",
            "Actors had to be replaced again and again; the controller's log tells of each.",
        ),
        _alert(
            "HerderLoadUneven", "max(herder_expert_balancedness) > 2", "30m", "info",
            "One expert actor has twice the mean load: balance.mode auto, or `herder rebalance`, moves experts.",
        ),
    ]  # fmt: skip
    return _object("PrometheusRule", NAME, {"groups": [{"name": NAME, "rules": rules}]})


def _alert(name: str, expression: str, lasting: str, severity: str, summary: str) -> Manifest:
    return {
        "alert": name,
        "expr": expression,
        "for": lasting,
        "labels": {"severity": severity},
        "annotations": {"summary": summary},
    }


def _object(kind: str, name: str, spec: Manifest) -> Manifest:
    metadata = {"name": name, "labels": {"app": NAME}}
    return {"apiVersion": _MONITORING, "kind": kind, "metadata": metadata, "spec": spec}
