"""/tokenize, /detokenize, /version, /load, /metrics; API keys and sizes; over gRPC as well where it has the same."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from actors.api_keys import ApiKeys, read_keys
from actors.gateway_core import GatewayCore
from actors.http_api import build_http_app
from actors.metrics import GatewayMetrics
from cluster.config import ConfigError, GatewayConfig
from engine.request import ErrorCode, RequestRejected
from engine.tokenizer import Tokenizer
from herder.v1 import inference_pb2 as pb
from herder.v1.control_pb2 import GetModelInfoRequest
from herder.v1.control_pb2_grpc import ControlServiceStub
from herder.v1.inference_pb2_grpc import InferenceServiceStub
from tests.gateway.conftest import serve_grpc, serve_http
from tests.gateway.fakes import MAX_CONTEXT, MODEL, FakeEngine
from tests.gateway.test_bad_input import check_grpc, check_http


async def test_tokenize_and_back(asgi: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Hell ö")
    answer = (await asgi.post("/tokenize", json={"model": MODEL, "prompt": "Hell ö", "return_token_strs": True})).json()
    assert answer == {
        "count": len(ids),
        "max_model_len": MAX_CONTEXT,
        "tokens": ids,
        "token_strs": ["<|begin_of_text|>", "Hell", " ", "ö"],
    }
    bare = (await asgi.post("/tokenize", json={"prompt": "Hell ö", "add_special_tokens": False})).json()
    assert (bare["tokens"], bare["token_strs"]) == (ids[1:], None)
    messages = [{"role": "user", "content": "Hi"}]
    chat = (await asgi.post("/tokenize", json={"messages": messages, "add_generation_prompt": True})).json()
    assert chat["tokens"] == tokenizer.encode_chat(messages)
    back = (await asgi.post("/detokenize", json={"tokens": ids})).json()
    assert back == {"prompt": "<|begin_of_text|>Hell ö"}


async def test_detokenize_over_grpc(inference: InferenceServiceStub, tokenizer: Tokenizer) -> None:
    answer = await inference.Detokenize(pb.DetokenizeRequest(token_ids=tokenizer.encode("Hell ö")))
    assert answer.text == "<|begin_of_text|>Hell ö"
    sentence = "token_ids has token id 300 at position 1, outside the vocabulary (0 to 299)"
    await check_grpc(inference.Detokenize(pb.DetokenizeRequest(token_ids=[1, 300])), "token_ids", sentence)


@pytest.mark.parametrize(
    ("path", "body", "field", "sentence"),
    [
        ("tokenize", {}, "prompt", "the body must have either prompt or messages"),
        ("tokenize", {"prompt": "a", "messages": []}, "prompt", "the body must have either prompt or messages"),
        ("tokenize", {"prompt": 1}, "prompt", "prompt: input should be a valid string"),
        ("tokenize", {"prompt": "\ud800"}, None, "the body has half of a surrogate pair, which is no character"),
        ("tokenize", {"prompt": "a", "model": "other"}, "model", None),
        ("tokenize", {"prompt": "a", "promt": "a"}, "promt", "promt: extra inputs are not permitted"),
        ("detokenize", {"tokens": [300]}, "tokens", None),
        ("detokenize", {"tokens": "a"}, "tokens", "tokens: input should be a valid list"),
    ],
)
async def test_bad_bodies(
    asgi: httpx.AsyncClient, path: str, body: dict[str, object], field: str | None, sentence: str | None
) -> None:
    response = await asgi.post(f"/{path}", content=json.dumps(body))
    check_http(response, field, sentence or response.json()["error"]["message"])


async def test_without_a_tokenizer(bare_http: httpx.AsyncClient) -> None:
    for path, body in (("tokenize", {"prompt": "a"}), ("detokenize", {"tokens": [1]})):
        error = (await bare_http.post(f"/{path}", json=body)).json()["error"]
        assert "no tokenizer" in error["message"]
    schema = {"prompt": [1], "response_format": {"type": "json_object"}}
    assert (await bare_http.post("/v1/completions", json=schema)).json()["error"]["param"] == "response_format"


async def test_version_and_load(asgi: httpx.AsyncClient) -> None:
    assert (await asgi.get("/version")).json() == {"version": "1.2.3"}
    load = (await asgi.get("/load")).json()
    assert load["server_load"] == 0
    assert load["engines"]["attention-0"]["running"] == 1
    assert load["engines"]["attention-0"]["kv_pages_total"] == {"full": 8}


async def samples(http: httpx.AsyncClient) -> dict[str, float]:
    """Values by name and labels, without the model's."""
    response = await http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            assert sample.name.startswith("herder_")
            labels = [value for name, value in sorted(sample.labels.items()) if name != "model"]
            found[" ".join([sample.name, *labels])] = sample.value
    return found


async def test_metrics(asgi: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.cached_tokens = 2
    await asgi.post("/v1/completions", json={"prompt": "Hi", "n": 2})
    engine.rejection = RequestRejected("full", code=ErrorCode.RESOURCE_EXHAUSTED)
    await asgi.post("/v1/completions", json={"prompt": "Hi"})
    found = await samples(asgi)
    assert (found["herder_requests_total stop"], found["herder_requests_total resource_exhausted"]) == (2, 1)
    assert found["herder_prompt_tokens_total"] == 9
    assert found["herder_prompt_tokens_cached_total"] == 4
    assert found["herder_generation_tokens_total"] == 2 * len(engine.answer)
    assert found["herder_time_to_first_token_seconds_count"] == 2
    assert found["herder_time_per_output_token_seconds_count"] == 2
    assert found["herder_e2e_request_latency_seconds_count"] == 3
    assert found["herder_ready"] == 1
    assert (found["herder_epoch"], found["herder_failovers_total"]) == (3, 15)
    assert (found["herder_expert_balancedness"], found["herder_expert_balancedness_before"]) == (1.25, 2.5)
    assert (found["herder_expert_seconds_since_move"], found["herder_requests_parked attention-0"]) == (14, 13)
    assert (found["herder_requests_running attention-0"], found["herder_requests_waiting attention-0"]) == (1, 0)
    assert found["herder_kv_cache_usage attention-0 full"] == 0.25
    assert found["herder_kv_cache_prefix attention-0 full"] == 0.5
    assert found["herder_preemptions_total attention-0"] == 12
    assert found["herder_requests_total abort"] == 0
    # Of all engines, in one series without labels, as an endpoint picker wants them.
    assert (found["herder_num_requests_running"], found["herder_num_requests_waiting"]) == (1, 0)
    assert found["herder_kv_cache_usage_perc"] == 0.25
    monkeypatch.setattr(engine, "status", lambda: 1 / 0)
    found = await samples(asgi)
    assert found["herder_ready"] == 0 and found["herder_requests_total stop"] == 2


def test_times_are_of_each_request() -> None:
    now = 0.0
    metrics = GatewayMetrics("m", clock=lambda: now)
    record = metrics.begin(5)
    for now, tokens in ((2.0, 1), (3.0, 2), (6.0, 2)):  # noqa: B007
        record.add(tokens, 0)
    now = 7.0
    record.end("stop")
    text = metrics.text(None).decode()
    assert 'herder_time_to_first_token_seconds_sum{model="m"} 2.0' in text
    assert 'herder_time_per_output_token_seconds_sum{model="m"} 1.0' in text
    assert 'herder_e2e_request_latency_seconds_sum{model="m"} 7.0' in text


# ---- API keys


KEYS = ApiKeys.of(["sk-one", "sk-two"])


@pytest.fixture
async def guarded(core: GatewayCore) -> AsyncIterator[str]:
    async for url in serve_http(core, KEYS, max_body_bytes=1000):
        yield url


async def test_keys_over_http(guarded: str, engine: FakeEngine) -> None:
    async with httpx.AsyncClient(base_url=guarded) as http:
        assert [(await http.get(path)).status_code for path in ("/health", "/health/ready")] == [200, 200]
        for path in ("/v1/models", "/metrics", "/nothing"):
            refused = await http.get(path)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
            assert refused.json()["error"]["code"] == "invalid_api_key"
    for key, right in (("sk-one", True), ("sk-two", True), ("sk-three", False), ("sk-on", False), ("ü", False)):
        headers = {"Authorization": f"Bearer {key}".encode("latin-1")}
        async with httpx.AsyncClient(base_url=guarded, headers=headers) as http:
            assert (await http.get("/v1/models")).status_code == (200 if right else 401)
    async with openai.AsyncOpenAI(base_url=f"{guarded}/v1", api_key="sk-no", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError, match="a valid API key is needed"):
            await client.completions.create(model=MODEL, prompt="Hi")
    assert engine.requests == []


@pytest.mark.parametrize("header", ["", "sk-one", "Basic sk-one", "Bearer", "Bearersk-one"])
def test_what_is_no_bearer_key(header: str) -> None:
    assert not KEYS.admit(header)
    assert KEYS.admit("bearer sk-one") and ApiKeys().admit(None)


async def test_keys_over_grpc(core: GatewayCore, engine: FakeEngine) -> None:
    async for channel in serve_grpc(core, KEYS, max_message_bytes=1000):
        inference, control = InferenceServiceStub(channel), ControlServiceStub(channel)
        for metadata in (None, (("authorization", "Bearer sk-three"),)):
            for call in (
                inference.Generate(pb.GenerateRequest(text="Hi"), metadata=metadata),
                control.GetModelInfo(GetModelInfoRequest(), metadata=metadata),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert engine.requests == []
        right = (("authorization", "Bearer sk-two"),)
        assert (await inference.Generate(pb.GenerateRequest(text="Hi"), metadata=right)).choices[0].text
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await inference.Generate(pb.GenerateRequest(text="a" * 1000), metadata=right)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_keys_from_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nsk-one\n\n  sk-two  \n")
    gateway = GatewayConfig(api_keys=(SecretStr("sk-zero"),), api_keys_file=file)
    assert read_keys(gateway) == ["sk-zero", "sk-one", "sk-two"]
    assert "sk-zero" not in repr(gateway)
    assert read_keys(GatewayConfig()) == []
    file.write_text("# none\n")
    with pytest.raises(ConfigError, match=r"gateway\.api_keys_file: .* holds no key"):
        read_keys(gateway)


# ---- sizes


async def test_bodies_that_are_too_large(guarded: str) -> None:
    async with httpx.AsyncClient(base_url=guarded, headers={"Authorization": "Bearer sk-one"}) as http:

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(20):
                yield b" " * 100

        for content in (b" " * 1001, pieces()):
            response = await http.post("/v1/completions", content=content)
            assert response.status_code == 413
            assert response.json()["error"] == {
                "message": "the body must be at most 1000 bytes",
                "type": "invalid_request_error",
                "param": None,
                "code": "request_too_large",
            }
        assert (await http.post("/v1/completions", json={"prompt": "Hi"})).status_code == 200


async def test_half_a_surrogate_pair_is_no_text(asgi: httpx.AsyncClient) -> None:
    half, sentence = '"\\ud800"', "the body has half of a surrogate pair, which is no character"
    for body in (f'{{"prompt": {half}}}', f'{{"prompt": "a", {half}: 1}}', f'{{"prompt": "a", "stop": {half}}}'):
        check_http(await asgi.post("/v1/completions", content=body), None, sentence)
    call = {"function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}
    messages = [{"role": "assistant", "tool_calls": [call]}]
    response = await asgi.post("/v1/chat/completions", json={"messages": messages})
    check_http(response, "messages", sentence.replace("the body", "messages"))


async def test_the_app_has_a_schema(core: GatewayCore) -> None:
    assert "/v1/chat/completions" in build_http_app(core).openapi()["paths"]
