"""Images that are refused, or fetched in vain, over both interfaces in the same words."""

from __future__ import annotations

import asyncio
import io
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import grpc
import httpx
import pytest
from PIL import Image

from actors.gateway_core import GatewayCore
from actors.http_api import build_http_app
from actors.image_fetch import ImageFetcher
from actors.image_prompt import ImagePrompts
from actors.model_info import ModelInfo
from cluster.config import VisionConfig
from engine.tokenizer import Tokenizer
from herder.v1 import inference_pb2 as pb
from herder.v1.inference_pb2_grpc import InferenceServiceStub
from tests.gateway.conftest import serve_grpc, serve_http
from tests.gateway.fakes import MAX_CONTEXT, MODEL, FakeEngine, image_spec
from tests.gateway.pictures import RED, WIDE, Turn, asking, data_url, over_grpc, over_http, picture


@pytest.fixture(autouse=True)
def roomy(core: GatewayCore) -> None:
    core.model = ModelInfo(MODEL, 1000, core.model.vocab_size, core.model.eos_token_ids)


def png_header(width: int, height: int) -> bytes:
    """A PNG that says to be so large, and holds nothing."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [head, b"IDAT", b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def pdf() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PDF")
    return file.getvalue()


FORMATS = "formats PNG, JPEG, WEBP, GIF, BMP, TIFF"
HOSTILE = [  # and what the sentence has to say
    (b"", "empty"),
    (b"hello", FORMATS),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", FORMATS),
    (pdf(), FORMATS),
    (RED[:20], FORMATS),
    (RED + b"x" * 2000, f"has {len(RED) + 2000} bytes, but at most 2000"),
    (picture(100, 51), "has 100 by 51 pixels, but at most 5000"),
    (png_header(1, 100_000), "1 by 100000 pixels"),
    (png_header(2**31 - 1, 2**31 - 1), "2147483647 by 2147483647 pixels"),
]
URLS = [
    ("file:///etc/passwd", "image 1: its url must be a data:, http: or https: URL"),
    ("http://169.254.169.254/", "image 1: this server fetches no images; send them as data: URLs"),
    ("data:image/png;base64,?", "image 1: its data: URL holds no valid base64: Only base64 data is allowed"),
]


async def refusal(
    asgi: httpx.AsyncClient,
    inference: InferenceServiceStub,
    messages: Sequence[Mapping[str, object]],
    request: pb.ChatRequest,
) -> str:
    """What is wrong with the messages: one sentence of both interfaces and all of their calls."""
    sentences = set()
    for path in ("/v1/chat/completions", "/tokenize"):
        response = await asgi.post(path, json={"messages": messages})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
        sentences.add(response.json()["error"]["message"])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await inference.Chat(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    (sentence,) = {*sentences, caught.value.details()}
    assert sentence.startswith("messages: ")
    return sentence.removeprefix("messages: ")


@pytest.mark.parametrize(("data", "problem"), HOSTILE, ids=range(len(HOSTILE)))
async def test_hostile_images(
    data: bytes,
    problem: str,
    asgi: httpx.AsyncClient,
    inference: InferenceServiceStub,
    engine: FakeEngine,
    tokenizer: Tokenizer,
) -> None:
    """While an answer with an image is under way, which is not disturbed."""
    engine.delay = 0.02

    async def text() -> str:
        return (await inference.Chat(asking(RED))).choices[0].text

    good = asyncio.create_task(text())
    await asyncio.sleep(0)
    sentence = await refusal(asgi, inference, over_http([("user", [data])]), asking(data))
    assert sentence.startswith("image 1: ") and problem in sentence
    assert await good == "Hello wörld"
    assert len(engine.requests) == 1


@pytest.mark.parametrize(("url", "problem"), URLS)
async def test_urls(url: str, problem: str, asgi: httpx.AsyncClient, inference: InferenceServiceStub) -> None:
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    assert await refusal(asgi, inference, messages, asking(pb.MediaItem(url=url))) == problem


@pytest.mark.parametrize("role", ["system", "developer", "assistant", "tool"])
async def test_only_users_show_images(role: str, asgi: httpx.AsyncClient, inference: InferenceServiceStub) -> None:
    known = "system" if role == "developer" else role
    turns: Sequence[Turn] = [(role, ["a", RED])]
    sentence = await refusal(asgi, inference, over_http(turns), pb.ChatRequest(messages=over_grpc(turns)))
    assert sentence == f"only the user shows images, not {known}"


async def test_too_many_images(asgi: httpx.AsyncClient, inference: InferenceServiceStub) -> None:
    response = await asgi.post("/v1/chat/completions", json={"messages": over_http([("user", [RED] * 5)])})
    assert response.json()["error"]["message"] == "messages may have at most 4 images, not 5"
    with pytest.raises(grpc.aio.AioRpcError, match="messages may have at most 4 images, not 5"):
        await inference.Chat(asking(*[RED] * 5))


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ({}, "a content part of type 'image_url' must have an image_url with a url"),
        ({"image_url": data_url(RED)}, "a content part of type 'image_url' must have an image_url with a url"),
        ({"image_url": {"url": 1}}, "a content part of type 'image_url' must have an image_url with a url"),
        ({"image_url": {"url": "x", "detail": "most"}}, "the detail of an image_url must be auto, low or high"),
    ],
)
async def test_parts_that_are_no_images(part: Mapping[str, object], sentence: str, asgi: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": [{"type": "image_url", **part}]}]
    response = await asgi.post("/v1/chat/completions", json={"messages": messages})
    assert (response.status_code, response.json()["error"]["message"]) == (400, f"messages: {sentence}")


async def test_a_media_item_of_nothing(inference: InferenceServiceStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="messages: an image must have data or a url"):
        await inference.Chat(asking(pb.MediaItem()))


async def test_images_count_for_the_context(asgi: httpx.AsyncClient, core: GatewayCore) -> None:
    core.model = ModelInfo(MODEL, MAX_CONTEXT, core.model.vocab_size, core.model.eos_token_ids)
    response = await asgi.post(
        "/v1/chat/completions", json={"messages": over_http([("user", [WIDE] * 3 + ["a" * 20])])}
    )
    assert response.json()["error"]["code"] == "context_length_exceeded"


async def test_a_model_without_images(blind_core: GatewayCore) -> None:
    sentence = "messages: this model takes no images"
    transport = httpx.ASGITransport(build_http_app(blind_core))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        body = {"messages": over_http([("user", [RED])])}
        assert (await client.post("/v1/chat/completions", json=body)).json()["error"]["message"] == sentence
        words = {"messages": over_http([("user", ["a", "b"])])}
        assert (await client.post("/v1/chat/completions", json=words)).status_code == 200
    async for channel in serve_grpc(blind_core):
        with pytest.raises(grpc.aio.AioRpcError, match=sentence):
            await InferenceServiceStub(channel).Chat(asking(RED))


async def test_a_template_without_places(asgi: httpx.AsyncClient, core: GatewayCore, checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_dir(checkpoint)
    assert tokenizer is not None
    tokenizer._fast.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    core.tokenizer = tokenizer
    response = await asgi.post("/v1/chat/completions", json={"messages": over_http([("user", [RED])])})
    assert response.json()["error"]["message"] == "messages: the chat template has places for 0 of 1 images"


# ---- Fetching


class Web(httpx.AsyncBaseTransport):
    """Public hosts: `slow` never answers, `missing` has nothing, all others have an image."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        host = request.headers["host"]
        if host == "slow.test":
            self.begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()
        if host == "missing.test":
            await self.begun.wait()
            return httpx.Response(404, stream=httpx.ByteStream(b""))
        return httpx.Response(200, headers={"content-type": "image/png"}, stream=httpx.ByteStream(WIDE))


@pytest.fixture
def web(core: GatewayCore, tokenizer: Tokenizer) -> Web:
    async def resolve(host: str) -> Sequence[str]:
        return ["93.184.215.14"]

    found, config = Web(), VisionConfig(allow_urls=True)
    core.images = ImagePrompts(image_spec(tokenizer), config, ImageFetcher(config, resolve, found))
    return found


def shown(*hosts: str, **more: object) -> dict[str, object]:
    parts = [{"type": "image_url", "image_url": {"url": f"https://{host}.test/a.png"}} for host in hosts]
    return {"messages": [{"role": "user", "content": parts}], **more}


async def test_fetched_images(
    web: Web, asgi: httpx.AsyncClient, inference: InferenceServiceStub, engine: FakeEngine
) -> None:
    assert (await asgi.post("/v1/chat/completions", json=shown("a", "b"))).status_code == 200
    await inference.Chat(asking(pb.MediaItem(url="https://a.test/a.png"), RED))
    assert engine.images == [(WIDE, WIDE), (WIDE, RED)]


async def test_one_image_that_fails_ends_the_others(web: Web, asgi: httpx.AsyncClient) -> None:
    response = await asgi.post("/v1/chat/completions", json=shown("slow", "missing"))
    sentence = "messages: image 2: https://missing.test/a.png cannot be fetched: the answer was 404"
    assert (response.status_code, response.json()["error"]["message"]) == (400, sentence)
    assert web.cancelled.is_set()


async def test_the_deadline_ends_a_fetch(web: Web, asgi: httpx.AsyncClient, inference: InferenceServiceStub) -> None:
    response = await asgi.post("/v1/chat/completions", json=shown("slow", timeout=0.1))
    assert (response.status_code, response.json()["error"]["message"]) == (504, "the request's deadline has passed")
    request = asking(pb.MediaItem(url="https://slow.test/"))
    request.options.timeout_s = 0.1
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await inference.Chat(request)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_client_that_goes_away_ends_its_fetch(web: Web, core: GatewayCore, engine: FakeEngine) -> None:
    async def leaves(call: asyncio.Future[object]) -> None:
        await asyncio.wait_for(web.begun.wait(), 10)
        call.cancel()
        await asyncio.wait_for(web.cancelled.wait(), 10)
        web.begun.clear()
        web.cancelled.clear()

    async for url in serve_http(core):
        async with httpx.AsyncClient(base_url=url) as client:
            await leaves(asyncio.ensure_future(client.post("/v1/chat/completions", json=shown("slow"))))
    async for channel in serve_grpc(core):
        await leaves(InferenceServiceStub(channel).Chat(asking(pb.MediaItem(url="https://slow.test/"))))
    assert engine.requests == []
