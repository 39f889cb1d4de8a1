"""A gateway core with a scripted engine behind both interfaces, in the test's loop: uvicorn and grpc.aio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx
import openai
import pytest
import uvicorn

from actors.api_keys import NO_KEYS, ApiKeys
from actors.gateway_core import GatewayCore
from actors.grpc_api import ControlServicer, InferenceServicer
from actors.http_api import build_http_app
from actors.image_fetch import ImageFetcher
from actors.image_prompt import ImagePrompts
from actors.model_info import ModelInfo
from engine.tokenizer import Tokenizer
from herder.v1.control_pb2_grpc import ControlServiceStub, add_ControlServiceServicer_to_server
from herder.v1.inference_pb2_grpc import InferenceServiceStub, add_InferenceServiceServicer_to_server
from tests.gateway.fakes import MAX_CONTEXT, MODEL, VISION, VOCAB_SIZE, FakeEngine, image_spec, save_tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory as far as the gateway reads it."""
    path = tmp_path_factory.mktemp("checkpoint")
    save_tokenizer(path)
    (path / "config.json").write_text(f'{{"text_config": {{"vocab_size": {VOCAB_SIZE}}}}}')
    return path


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path) -> Tokenizer:
    found = Tokenizer.from_dir(checkpoint)
    assert found is not None
    return found


@pytest.fixture
def engine(tokenizer: Tokenizer) -> FakeEngine:
    return FakeEngine([*tokenizer.encode("Hello wörld", add_special_tokens=False), *tokenizer.eos_token_ids])


@pytest.fixture
def core(engine: FakeEngine, tokenizer: Tokenizer, checkpoint: Path) -> GatewayCore:
    """Of a model that takes images."""
    model = ModelInfo.from_dir(checkpoint, MODEL, MAX_CONTEXT)
    images = ImagePrompts(image_spec(tokenizer), VISION, ImageFetcher(VISION))
    return GatewayCore(engine, tokenizer, model, "1.2.3", images)


@pytest.fixture
def blind_core(engine: FakeEngine, tokenizer: Tokenizer, checkpoint: Path) -> GatewayCore:
    """Without images."""
    return GatewayCore(engine, tokenizer, ModelInfo.from_dir(checkpoint, MODEL, MAX_CONTEXT))


@pytest.fixture
def bare_core(engine: FakeEngine, tokenizer: Tokenizer) -> GatewayCore:
    """Without a tokenizer."""
    return GatewayCore(engine, None, ModelInfo(MODEL, MAX_CONTEXT, VOCAB_SIZE, tokenizer.eos_token_ids))


async def serve_http(
    core: GatewayCore, keys: ApiKeys = NO_KEYS, max_body_bytes: int = 16 * 2**20
) -> AsyncIterator[str]:
    app = build_http_app(core, keys, max_body_bytes)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    server.install_signal_handlers = lambda: None
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()
    yield f"http://{host}:{port}"
    server.should_exit = True
    await task


@pytest.fixture
async def url(core: GatewayCore) -> AsyncIterator[str]:
    async for found in serve_http(core):
        yield found


@pytest.fixture
async def http(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url) as client:
        yield client


@pytest.fixture
async def asgi(core: GatewayCore) -> AsyncIterator[httpx.AsyncClient]:
    """Without a server, for many small requests."""
    transport = httpx.ASGITransport(build_http_app(core), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield client


@pytest.fixture
async def bare_http(bare_core: GatewayCore) -> AsyncIterator[httpx.AsyncClient]:
    async for url in serve_http(bare_core):
        async with httpx.AsyncClient(base_url=url) as client:
            yield client


@pytest.fixture
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as found:
        yield found


class Servicer(InferenceServicer, ControlServicer):
    def __init__(self, core: GatewayCore, keys: ApiKeys, max_message_bytes: int) -> None:
        self.core = core
        self.keys = keys
        self.max_message_bytes = max_message_bytes


async def serve_grpc(
    core: GatewayCore, keys: ApiKeys = NO_KEYS, max_message_bytes: int = 16 * 2**20
) -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server()
    servicer = Servicer(core, keys, max_message_bytes)
    add_InferenceServiceServicer_to_server(servicer, server)
    add_ControlServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(0)


@pytest.fixture
async def channel(core: GatewayCore) -> AsyncIterator[grpc.aio.Channel]:
    async for found in serve_grpc(core):
        yield found


@pytest.fixture
async def bare_channel(bare_core: GatewayCore) -> AsyncIterator[grpc.aio.Channel]:
    async for found in serve_grpc(bare_core):
        yield found


@pytest.fixture
def inference(channel: grpc.aio.Channel) -> InferenceServiceStub:
    return InferenceServiceStub(channel)


@pytest.fixture
def control(channel: grpc.aio.Channel) -> ControlServiceStub:
    return ControlServiceStub(channel)
