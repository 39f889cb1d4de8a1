"""The gateway's way to the image encoder: asked once for each image, again when a replica dies."""

from __future__ import annotations

import asyncio
import contextvars

import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import DeploymentUnavailableError

from actors import vision_client
from actors.encoded_images import EncodedImage
from actors.vision_client import VisionClient
from engine.request import ErrorCode, RequestRejected
from tests.actors.fake_encoder import FakeEncoder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision_client, "_FIRST_PAUSE_S", 0.001)


@pytest.fixture
async def encoder() -> FakeEncoder:
    return FakeEncoder()


def client_of(encoder: FakeEncoder, cache_bytes: int = 1000, timeout_s: float = 5.0) -> VisionClient:
    return VisionClient(encoder, cache_bytes, timeout_s)


async def ask(client: VisionClient, *digests: bytes) -> list[object]:
    return list(await client.embeddings(digests, [b"file of " + digest for digest in digests]))


async def test_an_image_is_asked_for_once(encoder):
    client = client_of(encoder)
    assert await ask(client, b"a", b"b", b"a") == ["a#1", "b#2", "a#1"]
    assert await ask(client, b"b", b"c") == ["b#2", "c#3"]
    assert encoder.asked == [b"a", b"b", b"c"]


async def test_requests_that_want_the_same_at_once_share_it(encoder):
    client = client_of(encoder)
    encoder.open.clear()
    first, second = asyncio.create_task(ask(client, b"a")), asyncio.create_task(ask(client, b"a"))
    await asyncio.sleep(0)
    first.cancel()  # its client goes away; the other still gets its own
    await asyncio.sleep(0)
    encoder.open.set()
    assert await second == ["a#1"]
    assert first.cancelled() and encoder.asked == [b"a"]


async def test_calls_belong_to_no_request():
    """Serve knows by context variables which request a call is part of."""
    mine = contextvars.ContextVar("mine", default="nobody's")

    async def encode(digest: bytes, data: bytes, traceparent: str | None) -> EncodedImage:
        return EncodedImage(mine.get(), 1)  # type: ignore[arg-type]

    mine.set("the request's")
    assert await VisionClient(encode, 1000, 5.0).embeddings([b"a"], [b"file"]) == ["nobody's"]


async def test_what_was_used_last_is_kept(encoder):
    client = client_of(encoder, cache_bytes=25)  # two of them
    for digest in (b"a", b"b", b"a", b"c", b"a", b"b"):
        await ask(client, digest)
    assert encoder.asked == [b"a", b"b", b"c", b"b"]
    huge = FakeEncoder(nbytes=26)
    client = client_of(huge, cache_bytes=25)
    await ask(client, b"a")
    await ask(client, b"a")
    assert huge.asked == [b"a", b"a"]


async def test_a_replica_that_dies_costs_a_retry(encoder):
    client = client_of(encoder)
    encoder.fail(ActorDiedError(), ActorDiedError())
    assert await ask(client, b"a") == ["a#3"]
    client.forget([b"a", b"z"])
    assert await ask(client, b"a") == ["a#4"]


@pytest.mark.parametrize("error", [ActorDiedError(), DeploymentUnavailableError("vision")], ids=["actor", "deployment"])
async def test_an_image_that_replicas_die_of_is_given_up(encoder, error):
    client = client_of(encoder)
    encoder.fail(*[error] * 100)
    with pytest.raises(RequestRejected) as caught:
        await ask(client, b"a")
    assert caught.value.code is ErrorCode.UNAVAILABLE and len(encoder.asked) == 5
    encoder.fail()
    assert await ask(client, b"a") == ["a#6"]


async def test_an_unreadable_image_is_refused_to_all_who_bring_it_and_not_remembered(encoder):
    client = client_of(encoder)
    encoder.unreadable = {b"file of a"}
    answers = await asyncio.gather(ask(client, b"a", b"b"), ask(client, b"a"), return_exceptions=True)
    for answer in answers:
        assert isinstance(answer, RequestRejected)
        assert (answer.code, answer.field) == (ErrorCode.INVALID_ARGUMENT, "messages")
    assert await ask(client, b"b") == ["b#2"]
    encoder.unreadable = set()
    assert await ask(client, b"a") == ["a#3"]


async def test_nobody_waits_for_ever(encoder):
    client = client_of(encoder, timeout_s=0.01)
    encoder.open.clear()
    with pytest.raises(RequestRejected, match=r"has answered for 0\.01 s") as caught:
        await ask(client, b"a")
    assert caught.value.code is ErrorCode.UNAVAILABLE
