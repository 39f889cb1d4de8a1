"""Image encoders of a live deployment: they scale from zero and back, encode an image once, and may be killed.

The deployment sends traces and writes its logs as JSON, which a request about an image shows as a whole.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import pytest
import ray

from actors.deployment import Deployment
from herder.v1 import control_pb2
from tests.collector import Collector
from tests.collector import collector as collecting
from tests.e2e.conftest import running
from tests.e2e.harm import Control
from tests.e2e.pictures import Reply, ask, encoders, images_encoded, png, running_encoders

pytestmark = pytest.mark.cluster

FROM_ZERO = (
    "vision.min_replicas=0",
    "vision.max_replicas=2",
    "vision.target_ongoing_requests=1",
    "vision.upscale_delay_s=0.5",
    "vision.downscale_delay_s=3",
    "vision.num_cpus=0.1",
    "placement_timeout_s=115",  # so long requests wait for an encoder: the clients' patience ends later
)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as found:
        yield found


@pytest.fixture(scope="module")
def deployment(collector: Collector) -> Iterator[Deployment]:
    with running(*FROM_ZERO, f"tracing.endpoint={collector.url}", "log_format=json") as found:
        yield found


@pytest.fixture
async def client(deployment: Deployment) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=deployment.http_url, timeout=120) as found:
        yield found


async def until(happens: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not await asyncio.to_thread(happens):
        assert time.monotonic() < end, "it does not happen"
        await asyncio.sleep(0.3)


class Burst:
    """Twelve clients that show ever new images, one after another; `answered` counts, and every one is answered."""

    def __init__(self, client: httpx.AsyncClient, first_seed: int) -> None:
        self.answered = 0
        self._client = client
        self._seeds = itertools.count(first_seed)
        self._enough = False

    async def during(self, midst: Callable[[], Awaitable[None]]) -> None:
        """Asks until `midst` returns."""
        clients = [asyncio.create_task(self._ask()) for _ in range(12)]
        try:
            await midst()
        finally:
            self._enough = True
            await asyncio.gather(*clients)

    async def _ask(self) -> None:
        while not self._enough:
            await ask(self._client, [png(next(self._seeds))])
            self.answered += 1


async def test_the_same_image_is_encoded_once(client):
    """Its second request finds its embeddings, and the KV of its tokens."""
    first = await ask(client, [png(1)])
    assert first.cached == 0 and first.prompt > 80
    again = [await ask(client, [png(1)]) for _ in range(3)]
    assert all(reply.is_like(first) for reply in again)
    assert max(reply.cached for reply in again) > 64  # of those that came to the same attention actor
    assert not (await ask(client, [png(2)])).is_like(first)
    await until(lambda: images_encoded() == 2)
    await asyncio.sleep(12)  # more than Ray's metrics are behind
    assert images_encoded() == 2


async def test_replicas_rise_from_zero_and_fall_back(client):
    await until(lambda: running_encoders() == 0)
    assert encoders() == []
    burst = Burst(client, 1000)
    await burst.during(lambda: until(lambda: running_encoders() == 2))
    assert burst.answered >= 12
    await until(lambda: running_encoders() == 0)


async def test_encoders_may_be_killed(client):
    """In mid-burst nothing fails; what they had encoded is encoded again when it is wanted."""
    known = [png(seed) for seed in range(10, 16)]

    async def everything() -> list[Reply]:
        return [await ask(client, images) for images in ([known[0]], known[1:3], known[3:6], [known[0], known[5]])]

    before = await everything()
    burst = Burst(client, 2000)

    async def killing() -> None:
        for _ in range(2):
            await until(lambda seen=burst.answered: burst.answered > seen + 12)
            for encoder in encoders():
                encoder.kill()

    await burst.during(killing)
    after = await everything()
    assert all(now.is_like(then) for now, then in zip(after, before, strict=True))


async def test_answers_about_images_move_to_another_engine(client, deployment):
    control = Control(deployment.grpc_address)
    images = [png(seed) for seed in range(30, 36)]

    def load() -> control_pb2.GetLoadResponse:
        return control.stub.GetLoad(control_pb2.GetLoadRequest(), timeout=60)

    async def answers() -> list[Reply]:
        return await asyncio.gather(*(ask(client, [image], max_tokens=400) for image in images))

    before = await answers()
    asking = asyncio.create_task(answers())
    await until(lambda: all(engine.running for engine in load().engines))
    control.hurt("attention-0")
    assert all(now.is_like(then) for now, then in zip(await asking, before, strict=True))
    control.until_whole()


async def test_a_request_is_one_trace_and_its_log_lines_are_json(client, collector):
    client.headers["X-Request-Id"] = "traced"
    await ask(client, [png(3000)])
    spans = [
        ("herder-gateway", "chat tiny", None),
        ("herder-gateway", "decode", "engine"),
        ("herder-vision", "encode image", "encode images"),
        ("herder-gateway", "encode images", "chat tiny"),
        ("herder-gateway", "engine", "chat tiny"),
        ("herder-gateway", "prefill", "engine"),
        ("herder-gateway", "queue", "engine"),
    ]
    await until(lambda: collector.trace_of("chatcmpl-traced") == spans)

    logs = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
    lines = [line for file in logs.glob("worker-*.err") for line in file.read_text().splitlines()]
    ended = [json.loads(line) for line in lines if "chatcmpl-traced" in line]
    assert [(line["event"], line["request_id"], line["reason"]) for line in ended] == [
        ("request ended", "chatcmpl-traced", "length")
    ]
