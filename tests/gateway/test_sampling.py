"""Several answers, penalties, structured output, deadlines and draining: field for field over both interfaces."""

from __future__ import annotations

import asyncio
import json
import time

import grpc
import httpx
import openai
import pytest

from actors.gateway_core import GatewayCore
from engine.request import Grammar, Request
from engine.tokenizer import Tokenizer
from herder.v1 import inference_pb2 as pb
from herder.v1 import types_pb2
from herder.v1.control_pb2 import DrainRequest, GetLoadRequest, GetServerInfoRequest
from herder.v1.control_pb2_grpc import ControlServiceStub
from herder.v1.inference_pb2_grpc import InferenceServiceStub
from herder.v1.types_pb2 import SamplingParams, TokenIds
from tests.gateway.fakes import MODEL, FakeEngine
from tests.gateway.test_http import events

SAMPLING = {
    "min_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.75,
    "top_k": 5,
    "min_p": 0.125,
    "repetition_penalty": 1.25,
    "presence_penalty": -0.5,
    "frequency_penalty": 1.5,
    "seed": -3,
    "ignore_eos": True,
    "stop": ["zz"],
    "stop_token_ids": [7],
    "logprobs": 2,
    "prompt_logprobs": 1,
}


async def asked_over_both(
    http_body: dict[str, object],
    grpc_fields: dict[str, object],
    asgi: httpx.AsyncClient,
    inference: InferenceServiceStub,
    engine: FakeEngine,
) -> list[Request]:
    """What reaches the engine, without what only names the request."""
    response = await asgi.post("/v1/completions", json={"prompt": [1, 2], "max_tokens": 9, **http_body})
    assert response.status_code == 200, response.text
    await inference.Generate(pb.GenerateRequest(token_ids=TokenIds(ids=[1, 2]), **grpc_fields))
    return engine.requests


async def test_the_same_request_over_both_interfaces(
    asgi: httpx.AsyncClient, inference: InferenceServiceStub, engine: FakeEngine
) -> None:
    bias = {3: -100.0, 299: 4.5}
    extra = {"priority": -2, "cache_salt": "mine"}
    body = {**SAMPLING, **extra, "logit_bias": {str(token): value for token, value in bias.items()}}
    sampling = SamplingParams(**SAMPLING, max_tokens=9, logit_bias=bias)
    fields = {"sampling": sampling, "options": pb.RequestOptions(**extra)}
    http, rpc = await asked_over_both(body, fields, asgi, inference, engine)
    assert http.params == rpc.params
    assert http.params.logit_bias == tuple(bias.items())
    for name in ("min_tokens", "temperature", "top_k", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert getattr(http.params, name) == SAMPLING[name]
    assert (http.priority, http.cache_salt) == (rpc.priority, rpc.cache_salt) == (-2, "mine")
    assert http.grammar is rpc.grammar is None


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
SCHEMA_TEXT = json.dumps(SCHEMA, separators=(",", ":"))
GRAMMARS = [
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}},
        types_pb2.Grammar(json_schema=json.dumps(SCHEMA)),
        Grammar("json_schema", SCHEMA_TEXT),
    ),
    ({"structured_outputs": {"json": SCHEMA}}, None, Grammar("json_schema", SCHEMA_TEXT)),
    ({"structured_outputs": {"json": "true"}}, None, Grammar("json_schema", "true")),
    (
        {"response_format": {"type": "json_object"}},
        types_pb2.Grammar(json_object=types_pb2.JsonObject()),
        Grammar("json_object", ""),
    ),
    ({"structured_outputs": {"json_object": True}}, None, Grammar("json_object", "")),
    ({"structured_outputs": {"regex": "[ab]+"}}, types_pb2.Grammar(regex="[ab]+"), Grammar("regex", "[ab]+")),
    (
        {"structured_outputs": {"choice": ["yes", "no"]}},
        types_pb2.Grammar(choice=types_pb2.Choices(choices=["yes", "no"])),
        Grammar("choice", '["yes","no"]'),
    ),
    (
        {"structured_outputs": {"grammar": 'start: "a"'}},
        types_pb2.Grammar(lark='start: "a"'),
        Grammar("lark", 'start: "a"'),
    ),
    ({"response_format": {"type": "text"}}, None, None),
]


@pytest.mark.parametrize(("body", "message", "grammar"), GRAMMARS)
async def test_grammars(
    body: dict[str, object],
    message: types_pb2.Grammar | None,
    grammar: Grammar | None,
    asgi: httpx.AsyncClient,
    inference: InferenceServiceStub,
    engine: FakeEngine,
) -> None:
    fields = {} if message is None else {"sampling": SamplingParams(grammar=message)}
    http, rpc = await asked_over_both(body, fields, asgi, inference, engine)
    assert http.grammar == grammar
    assert message is None or rpc.grammar == grammar
    chat = {"messages": [{"role": "user", "content": "Hi"}], **body}
    assert (await asgi.post("/v1/chat/completions", json=chat)).status_code == 200
    assert engine.requests[-1].grammar == grammar


async def test_several_answers_have_seeds_of_their_own(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.cached_tokens = 2
    answer = await client.completions.create(model=MODEL, prompt=["ab", "cd"], n=3, max_tokens=2, seed=5)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [request.request_id for request in engine.requests] == [f"{answer.id}-{index}" for index in range(6)]
    assert [request.params.seed for request in engine.requests] == [5, 6, 7] * 2
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 12)  # each prompt counts once
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    await client.completions.create(model=MODEL, prompt="ab", n=2, seed=2**63 - 1, max_tokens=1)
    assert [request.params.seed for request in engine.requests[6:]] == [2**63 - 1, -(2**63)]


async def test_several_answers_stream_with_their_index(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "n": 3, "stream_options": {"include_usage": True}}
    chunks = await events(http, "/v1/chat/completions", body)
    texts, roles, reasons = ["", "", ""], [0, 0, 0], [0, 0, 0]
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content") or ""
        roles[choice["index"]] += "role" in choice["delta"]
        reasons[choice["index"]] += choice["finish_reason"] == "stop"
    assert (texts, roles, reasons) == (["Hello wörld"] * 3, [1] * 3, [1] * 3)
    assert chunks[-1]["usage"]["completion_tokens"] == 3 * len(engine.answer)
    assert chunks[-1]["usage"]["prompt_tokens"] == len(engine.requests[0].prompt_token_ids)


async def test_several_answers_over_grpc(inference: InferenceServiceStub, engine: FakeEngine) -> None:
    engine.cached_tokens = 1
    sampling = SamplingParams(n=2, max_tokens=3, seed=1)
    answer = await inference.Generate(pb.GenerateRequest(text="Hi", sampling=sampling, request_id="me"))
    assert answer.request_id == "me"
    assert [(c.index, c.text, tuple(c.token_ids)) for c in answer.choices] == [
        (index, "Hello ", engine.answer[:3]) for index in range(2)
    ]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.cached_tokens) == (3, 6, 1)
    assert [(request.request_id, request.params.seed) for request in engine.requests] == [("me-0", 1), ("me-1", 2)]
    call = inference.GenerateStream(pb.GenerateStreamRequest(text="Hi", sampling=sampling))
    streamed = [event async for event in call]
    texts = ["", ""]
    for event in streamed:
        texts[event.index] += event.tokens.text
    assert texts == ["Hello "] * 2
    assert [event.WhichOneof("event") for event in streamed].count("prompt") == 1
    assert streamed[0].prompt.cached_tokens == 1
    finished = [event.finished for event in streamed if event.WhichOneof("event") == "finished"]
    assert len(finished) == 2 and finished[-1].usage == answer.usage


async def test_an_answer_of_several_is_aborted_by_the_requests_name(
    asgi: httpx.AsyncClient, core: GatewayCore, engine: FakeEngine
) -> None:
    engine.delay = 0.01
    body = {"prompt": "Hi", "max_tokens": 50, "ignore_eos": True, "n": 2, "request_id": "it"}
    task = asyncio.create_task(asgi.post("/v1/completions", json=body))
    while len(engine.running) < 2:
        await asyncio.sleep(0.01)
    assert await core.abort(["it"]) == 2
    assert [choice["finish_reason"] for choice in (await task).json()["choices"]] == ["abort"] * 2


async def test_prompt_logprobs(asgi: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Hi")
    body = {"prompt": "Hi", "max_tokens": 1, "prompt_logprobs": 2}
    (choice,) = (await asgi.post("/v1/completions", json=body)).json()["choices"]
    found = choice["prompt_logprobs"]
    assert found[0] is None and [next(iter(entry)) for entry in found[1:]] == [str(i) for i in ids[1:]]
    assert found[1][str(ids[1])] == {"logprob": -float(ids[1] % 7), "rank": 1, "decoded_token": "H"}
    assert len(found[1]) == 2
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "prompt_logprobs": 0}
    answer = (await asgi.post("/v1/chat/completions", json=chat)).json()
    assert answer["prompt_logprobs"][0] is None
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]


# ---- deadlines


async def test_a_deadline_reaches_the_engine(
    asgi: httpx.AsyncClient, inference: InferenceServiceStub, engine: FakeEngine
) -> None:
    body = {"prompt": "Hi", "max_tokens": 1}
    now = time.time()
    await asgi.post("/v1/completions", json=body | {"timeout": 100})
    await asgi.post("/v1/completions", json=body, headers={"X-Request-Timeout": "100"})
    await asgi.post("/v1/completions", json=body | {"timeout": 100}, headers={"X-Request-Timeout": "5"})
    options = pb.RequestOptions(timeout_s=100)
    await inference.Generate(pb.GenerateRequest(text="Hi", options=options))
    await inference.Generate(pb.GenerateRequest(text="Hi"), timeout=100)
    await inference.Generate(pb.GenerateRequest(text="Hi", options=options), timeout=1000)
    assert [request.deadline for request in engine.requests] == [pytest.approx(now + 100, abs=3)] * 6
    await inference.Generate(pb.GenerateRequest(text="Hi"))
    await asgi.post("/v1/completions", json=body)
    assert [request.deadline for request in engine.requests[6:]] == [None, None]


async def test_a_deadline_that_passes(
    http: httpx.AsyncClient, inference: InferenceServiceStub, engine: FakeEngine
) -> None:
    engine.delay = 0.03
    body = {"prompt": "Hi", "timeout": 0.1, "ignore_eos": True, "max_tokens": 50}
    response = await http.post("/v1/completions", json=body)
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"
    assert (await events(http, "/v1/completions", body))[-1]["error"]["message"] == "the request's deadline has passed"
    sampling, options = SamplingParams(ignore_eos=True), pb.RequestOptions(timeout_s=0.1)
    call = inference.GenerateStream(pb.GenerateStreamRequest(text="Hi", sampling=sampling, options=options))
    assert [event async for event in call][-1].error.code == types_pb2.ERROR_CODE_DEADLINE_EXCEEDED
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await inference.Generate(pb.GenerateRequest(text="Hi", sampling=sampling, options=options))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("header", ["soon", "-1", "nan", "inf", "0"])
async def test_a_timeout_that_is_none(asgi: httpx.AsyncClient, header: str) -> None:
    response = await asgi.post("/v1/completions", json={"prompt": "Hi"}, headers={"X-Request-Timeout": header})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "X-Request-Timeout"


# ---- draining


async def test_drain(
    http: httpx.AsyncClient, inference: InferenceServiceStub, control: ControlServiceStub, engine: FakeEngine
) -> None:
    engine.delay = 0.02
    running = asyncio.create_task(http.post("/v1/completions", json={"prompt": "Hi"}))
    while not engine.running:
        await asyncio.sleep(0.005)
    assert (await control.Drain(DrainRequest())).remaining == 1
    ready = await http.get("/health/ready")
    assert (ready.status_code, ready.json()["reason"]) == (503, "draining")
    assert not (await control.GetServerInfo(GetServerInfoRequest())).ready
    refused = await http.post("/v1/completions", json={"prompt": "Hi"})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await inference.Generate(pb.GenerateRequest(text="Hi"))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert (await running).json()["choices"][0]["text"] == "Hello wörld"
    assert (await control.Drain(DrainRequest())).remaining == 0


async def test_load_over_grpc(control: ControlServiceStub) -> None:
    (load,) = (await control.GetLoad(GetLoadRequest())).engines
    assert (load.cached_prompt_tokens, load.preemptions, load.kv_pages[0].cached) == (11, 12, 4)
