"""Traces of requests: one tree over gateway, image encoder and engines, by both interfaces; or nothing at all."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from actors import ray_client, vision
from actors.current_span import start_tracing
from actors.gateway_core import GatewayCore
from actors.tracing import Tracing
from actors.vision import Vision
from actors.vision_client import VisionClient
from cluster.config import DeploymentConfig, TracingConfig
from engine.request import ErrorCode, ExpertSeconds, FinishReason, RequestError, RequestOutput, Timeline
from herder.v1 import inference_pb2 as pb
from herder.v1.inference_pb2_grpc import InferenceServiceStub
from tests.collector import collector
from tests.gateway.client_streams import connect, until
from tests.gateway.conftest import serve_grpc, serve_http
from tests.gateway.fake_actors import FakeController
from tests.gateway.fake_actors import FakeEngine as FakeActor
from tests.gateway.pictures import RED, over_http
from tests.imports import loaded_by

TINY = Path(__file__).parents[2] / "checkpoints" / "tiny"
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
NOT_SAMPLED = CALLER[:-1] + "0"
TIMELINE = Timeline(1000.0, 1001.0, 1003.0, 1007.0, ExpertSeconds(0.25, 0.5), ExpertSeconds(1.25, 1.5))
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 3}


async def ask(core: GatewayCore, path: str, body: object, **headers: str) -> httpx.Response:
    async for url in serve_http(core):
        async with httpx.AsyncClient(base_url=url) as client:
            return await client.post(path, json=body, headers=headers)
    raise AssertionError


# ---- the whole way, over the wire


async def test_one_tree_over_gateway_encoder_and_engines(core, monkeypatch):
    monkeypatch.setattr(ray_client, "_FIRST_PAUSE_S", 0.002)
    monkeypatch.setattr(vision.ray, "put", lambda array: "embeddings")
    first, second = FakeActor(), FakeActor()
    with collector() as found:
        config = DeploymentConfig.model_validate(
            {"model": {"path": TINY, "dtype": "float32"}, "tracing": {"endpoint": found.url}}
        )
        replica, tracing = Vision(config), start_tracing(config.tracing, "gateway")
        controller = FakeController(first=first, second=second)
        core.engine = await connect(controller, vision=VisionClient(replica.encode, 1000, 30.0))
        core.tracing = tracing
        body = {**CHAT, "messages": over_http([("user", [RED, "a"])])}
        answer = asyncio.create_task(ask(core, "/v1/chat/completions", body, traceparent=CALLER))
        await until(lambda: first.requests)
        (request,) = first.requests.values()
        assert request.timed
        first.send(RequestOutput(request.request_id, (5,)))
        await asyncio.sleep(0.02)
        first.die()
        await until(lambda: second.requests)
        last = RequestOutput(request.request_id, (6, 7), finish_reason=FinishReason.LENGTH, timeline=TIMELINE)
        second.send(last)
        assert (await answer).status_code == 200
        assert tracing is not None and replica._tracing is not None
        tracing.close()
        replica._tracing.close()

    root, caller = found.one("chat tiny"), CALLER.split("-")
    assert root.span.parent_span_id.hex() == caller[2]
    assert {one.span.trace_id.hex() for one in found.received} == {caller[1]}
    parents = {one.span.name: found.parent(one.span.name) for one in found.received}
    assert parents == {
        "chat tiny": None,
        "encode images": "chat tiny",
        "encode image": "encode images",
        "engine": "chat tiny",
        "queue": "engine",
        "prefill": "engine",
        "decode": "engine",
    }
    assert {one.span.name: one.service for one in found.received if one.service != "herder-gateway"} == {
        "encode image": "herder-vision"
    }
    assert found.one("encode image").attributes == {"herder.cached": False}
    assert found.one("engine").attributes["herder.engine"] == "second"
    seconds = {name: _seconds(found.one(name).span) for name in ("engine", "queue", "prefill", "decode")}
    assert seconds == {"engine": (1000, 1007), "queue": (1000, 1001), "prefill": (1001, 1003), "decode": (1003, 1007)}
    assert found.one("decode").attributes == {"herder.dispatch_seconds": 1.25, "herder.combine_seconds": 1.5}
    (moved,) = root.span.events
    assert moved.name == "moved" and moved.attributes[0].value.string_value == "second"
    assert root.attributes["gen_ai.usage.output_tokens"] == 3
    assert root.attributes["http.response.status_code"] == 200


async def test_an_engine_tells_of_a_request_after_its_client_has_gone(core, spans):
    """As after a stop string, which the gateway finds."""
    actor = FakeActor()
    core.engine = await connect(FakeController(actor=actor))
    async for url in serve_http(core):
        async with httpx.AsyncClient(base_url=url) as client:
            answer = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
            await until(lambda: actor.requests)
            answer.cancel()
            await until(lambda: any(call.startswith("abort") for call in actor.calls))
    (name,) = actor.requests
    actor.send(RequestOutput(name, finish_reason=FinishReason.ABORT, timeline=TIMELINE))
    await until(lambda: len(spans.get_finished_spans()) == 5)
    root, engine = (span for span in spans.get_finished_spans() if span.name in ("chat tiny", "engine"))
    assert engine.parent == root.context and root.attributes["gen_ai.response.finish_reasons"] == ("abort",)


def _seconds(span: object) -> tuple[float, float]:
    return span.start_time_unix_nano / 1e9, span.end_time_unix_nano / 1e9  # type: ignore[attr-defined]


# ---- each interface, over the scripted engine


@pytest.fixture
def spans(core: GatewayCore) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    core.tracing = Tracing(SimpleSpanProcessor(exporter), 1.0, "gateway")
    return exporter


@pytest.fixture
def unsampled(core: GatewayCore) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    core.tracing = Tracing(SimpleSpanProcessor(exporter), 0.0, "gateway")
    return exporter


def only(spans: InMemorySpanExporter) -> ReadableSpan:
    (span,) = spans.get_finished_spans()
    return span


async def test_a_requests_attributes_over_http(core, engine, spans):
    engine.cached_tokens = 1
    body = {"model": "tiny", "prompt": "a", "max_tokens": 2, "n": 2, "temperature": 0.5, "stream": True}
    answer = await ask(core, "/v1/completions", body)
    assert "[DONE]" in answer.text
    span = only(spans)
    assert span.name == "text_completion tiny" and span.parent is None
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "herder",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 2,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.response.finish_reasons": ("length", "length"),
        "gen_ai.usage.output_tokens": 4,
        "http.response.status_code": 200,
    }
    assert expected.items() <= span.attributes.items()
    assert span.status.status_code is StatusCode.UNSET


async def test_a_call_over_grpc_goes_on_with_its_callers_trace(core, spans):
    async for channel in serve_grpc(core):
        stub = InferenceServiceStub(channel)
        message = pb.ChatStreamRequest(messages=[pb.ChatMessage(role="user", content=[pb.ContentPart(text="a")])])
        async for _ in stub.ChatStream(message, metadata=[("traceparent", CALLER)]):
            pass
    span = only(spans)
    assert span.name == "chat tiny" and span.parent is not None
    assert f"{span.parent.span_id:016x}" == CALLER.split("-")[2]


async def test_what_the_client_did_wrong_is_no_error_of_the_server(core, engine, spans):
    await ask(core, "/v1/chat/completions", {**CHAT, "max_tokens": 10_000})
    span = only(spans)
    assert span.attributes["error.type"] == "INVALID_ARGUMENT" and span.status.status_code is StatusCode.UNSET
    spans.clear()
    engine.failure = RequestError(ErrorCode.INTERNAL, "broken")
    async for channel in serve_grpc(core):
        with pytest.raises(grpc.aio.AioRpcError):
            await InferenceServiceStub(channel).Generate(pb.GenerateRequest(text="a"))
    span = only(spans)
    assert span.attributes["error.type"] == "INTERNAL" and span.status.status_code is StatusCode.ERROR


async def test_a_prompt_is_in_no_span(core, engine, spans):
    for body in ({**CHAT, "messages": [{"role": "user", "content": "XYZZY"}]}, {**CHAT, "stop": "XYZZY", "n": "XYZZY"}):
        await ask(core, "/v1/chat/completions", body)
    assert len(spans.get_finished_spans()) == 2
    assert "XYZZY" not in "".join(span.to_json() for span in spans.get_finished_spans())


# ---- not traced


async def test_a_caller_decides_and_else_the_ratio(core, engine, unsampled):
    await ask(core, "/v1/chat/completions", CHAT)
    await ask(core, "/v1/chat/completions", CHAT, traceparent=NOT_SAMPLED)
    assert not unsampled.get_finished_spans() and not any(request.timed for request in engine.requests)
    await ask(core, "/v1/chat/completions", CHAT, traceparent=CALLER)
    assert only(unsampled).name == "chat tiny" and engine.requests[-1].timed


async def test_without_an_endpoint_nothing_is_timed_or_imported(core, engine):
    assert start_tracing(TracingConfig(), "gateway") is None
    await ask(core, "/v1/chat/completions", CHAT, traceparent=CALLER)
    assert not engine.requests[-1].timed
    code = "import actors.gateway, actors.ray_client"
    assert not await asyncio.to_thread(loaded_by, code, "opentelemetry.exporter.otlp")
