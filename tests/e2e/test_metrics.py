"""Prometheus scrapes the live tiny deployment: each query of the dashboard and of the alerts finds what it asks for."""

from __future__ import annotations

import asyncio
import math
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
import yaml

from actors.deployment import Deployment
from cluster.grafana import ROWS
from cluster.manifests_watch import alerts
from tests.e2e.conftest import free_port, ray_session
from tests.e2e.pictures import ask, png

pytestmark = pytest.mark.cluster

PROMETHEUS = shutil.which("prometheus")
RULES = alerts()["spec"]
WAIT_S = 60.0  # Ray exports every ten seconds


@dataclass(frozen=True)
class Prometheus:
    url: str

    def values(self, expression: str) -> list[float]:
        """The result's numbers, one for each series. A query that Prometheus does not understand fails."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", (expression, answer)
        return [float(series["value"][1]) for series in answer["data"]["result"]]

    def unanswered(self, expressions: set[str]) -> set[str]:
        """Those of the expressions that give no number."""
        return {one for one in expressions if not any(map(math.isfinite, self.values(one)))}

    def answers(self, expressions: set[str]) -> None:
        """Waits until each of the expressions has given a number, be it not all at once: a late scrape has none."""
        deadline = time.monotonic() + WAIT_S
        left = expressions
        while left := self.unanswered(left):
            assert time.monotonic() < deadline, f"no data for {sorted(left)}"
            time.sleep(0.5)


@pytest.fixture(scope="module")
def prometheus(tiny: Deployment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    if PROMETHEUS is None:
        pytest.skip("prometheus is not installed (Debian's package of this name)")
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "rules.yaml").write_text(yaml.safe_dump(RULES))
    nodes = [{"files": [str(ray_session() / "prom_metrics_service_discovery.json")]}]
    gateways = [{"targets": [tiny.http_url.removeprefix("http://")]}]
    configuration = {
        "global": {"scrape_interval": "2s", "evaluation_interval": "1s"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [
            {"job_name": "ray", "file_sd_configs": nodes},
            {"job_name": "gateways", "static_configs": gateways},
        ],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
    port = free_port()
    command = [
        PROMETHEUS, f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        found = Prometheus(f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + WAIT_S
        while not _is_up(found.url):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        yield found
    finally:
        process.terminate()
        process.wait(30)


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready").status_code == 200
    except httpx.HTTPError:
        return False


async def _twenty_requests(url: str) -> None:
    """A conversation among prompts, all at once; images, one of them twice; and one whose client goes away."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        prompts = [{"model": "tiny", "prompt": f"{n}+{n}=", "max_tokens": 8, "ignore_eos": True} for n in range(15)]
        conversation = {"model": "tiny", "messages": [{"role": "user", "content": "17+25="}]}
        answers = await asyncio.gather(
            client.post("/v1/chat/completions", json=conversation),
            *(client.post("/v1/completions", json=prompt) for prompt in prompts),
        )
        assert {answer.status_code for answer in answers} == {200}
        for seed in (1, 2, 2):
            await ask(client, [png(seed)])
        long = prompts[0] | {"max_tokens": 2000, "stream": True}
        async with client.stream("POST", "/v1/completions", json=long) as response:
            await anext(response.aiter_lines())


def test_every_query_finds_data(tiny: Deployment, prometheus: Prometheus) -> None:
    async def one_each() -> None:
        async with httpx.AsyncClient(base_url=tiny.http_url, timeout=60) as client:
            await ask(client, [png(0)])

    # What has been there before is needed for a rate.
    asyncio.run(one_each())
    histograms = ("time_to_first_token", "time_per_output_token", "e2e_request_latency", "vision_encode")
    prometheus.answers({f"ray_herder_{name}_seconds_count" for name in histograms})
    asyncio.run(_twenty_requests(tiny.http_url))

    panels = [panel for _, row in ROWS for panel in row]
    queries = {query.expression.replace("$__rate_interval", "1m") for panel in panels for query in panel.queries}
    watched = {name for rule in RULES["groups"][0]["rules"] for name in re.findall(r"herder_\w+", rule["expr"])}
    assert len(queries) > 30 and len(watched) == 6
    prometheus.answers(queries | watched)
    for rule in RULES["groups"][0]["rules"]:
        assert prometheus.values(rule["expr"]) == [], f"{rule['alert']} fires"

    # Ray's export says the same as the engines themselves.
    prometheus.answers(
        {
            "sum(ray_herder_engine_generation_tokens_total) == sum(herder_engine_generation_tokens_total)",
            "sum(ray_herder_requests_total) == sum(herder_requests_total)",
            'sum(ray_herder_requests_total{reason="abort"}) >= 1',
            "sum(ray_herder_failovers_total) < 1",
            "count(count by (expert) (ray_herder_expert_rows_total)) == 16",
            "herder_num_requests_running == 0",
        }
    )
