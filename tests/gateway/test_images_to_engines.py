"""Images on their way to the engines, over fakes: encoded before the request goes, and again when that gets lost."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from actors import ray_client, vision_client
from actors.ray_client import RayEngineClient
from actors.vision_client import VisionClient
from engine.request import ErrorCode, FinishReason, PromptImage, Request, RequestRejected
from tests.actors.fake_encoder import FakeEncoder
from tests.gateway.client_streams import Stream, connect, last, request, until
from tests.gateway.fake_actors import FakeController, FakeEngine

FILES = (b"one", b"two")
IMAGES = (PromptImage(0, 1, b"a"), PromptImage(0, 1, b"b"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_client, "_FIRST_PAUSE_S", 0.002)
    monkeypatch.setattr(vision_client, "_FIRST_PAUSE_S", 0.001)


@pytest.fixture
async def a() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def b() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
async def client(a: FakeEngine, b: FakeEngine, encoder: FakeEncoder) -> RayEngineClient:
    """Of two engines; the first request goes to `a`."""
    return await connect(FakeController(a=a, b=b), vision=VisionClient(encoder, 1000, 5.0))


def with_images(name: str, **fields: object) -> Request:
    return request(name, images=IMAGES, **fields)


async def test_an_engine_gets_the_embeddings_and_not_the_files(client, a, b, encoder):
    stream = Stream(client, with_images("one"), FILES)
    await until(lambda: a.requests)
    assert a.embeddings["one"] == ("a#1", "b#2")
    assert a.requests["one"].images == IMAGES
    again = Stream(client, with_images("two"), FILES)
    await until(lambda: b.requests)
    assert b.embeddings["two"] == ("a#1", "b#2") and encoder.asked == [b"a", b"b"]
    a.send(last("one", 5))
    b.send(last("two", 6))
    for one in (stream, again):
        await one.end()


async def test_a_request_takes_its_images_to_another_engine(client, a, b, encoder):
    stream = Stream(client, with_images("one"), FILES)
    await until(lambda: a.requests)
    a.die()
    await until(lambda: b.requests)
    assert b.embeddings["one"] == ("a#1", "b#2") and encoder.asked == [b"a", b"b"]
    b.send(last("one", 5))
    await stream.end()


async def test_embeddings_that_get_lost_are_made_again(client, a, b, encoder):
    a.lost = {"b#2", "a#3"}
    stream = Stream(client, with_images("one"), FILES)
    await until(lambda: a.requests)
    assert a.embeddings["one"] == ("a#5", "b#6")
    b.lost = {"a#5"}
    a.die()
    await until(lambda: b.requests)
    assert b.embeddings["one"] == ("a#7", "b#8")
    b.send(last("one", 5))
    assert (await stream.end()).finish_reason is FinishReason.LENGTH


async def test_embeddings_that_are_always_lost_end_the_request(client, a, b, encoder):
    class Everything(set[object]):
        def intersection(self, *others: object) -> set[object]:
            return {"lost"}

    a.lost, b.lost = Everything(), Everything()
    with pytest.raises(RequestRejected, match="again and again") as caught:
        await Stream(client, with_images("one"), FILES).end()
    assert caught.value.code is ErrorCode.UNAVAILABLE
    assert not a.requests and not b.requests


async def test_an_image_that_cannot_be_read_reaches_no_engine(client, a, encoder):
    encoder.unreadable = {b"two"}
    with pytest.raises(RequestRejected, match="broken") as caught:
        await Stream(client, with_images("one"), FILES).end()
    assert caught.value.field == "messages" and not a.calls
    stream = Stream(client, with_images("one"), (b"one", b"three"))  # the id is free again
    await until(lambda: a.requests)
    a.send(last("one", 5))
    await stream.end()


async def test_an_abort_while_images_are_encoded(client, a, encoder):
    encoder.open.clear()
    stream = Stream(client, with_images("one"), FILES)
    await until(lambda: encoder.asked)
    assert await client.abort(["one", "unknown"]) == 1
    encoder.open.set()
    assert (await stream.end()).finish_reason is FinishReason.ABORT
    assert "submit one" not in a.calls


async def test_a_client_that_goes_away_while_images_are_encoded(client, a, encoder):
    encoder.open.clear()
    stream = Stream(client, with_images("one"), FILES)
    await until(lambda: encoder.asked)
    stream.task.cancel()
    await asyncio.wait([stream.task])
    encoder.open.set()
    await asyncio.sleep(0.01)
    assert not a.calls


async def test_a_deadline_that_passes_while_images_are_encoded(client, a, encoder):
    encoder.open.clear()
    with pytest.raises(RequestRejected, match="deadline") as caught:
        await Stream(client, replace(with_images("one"), deadline=time.time() + 0.05), FILES).end()
    assert caught.value.code is ErrorCode.DEADLINE_EXCEEDED and not a.calls
