"""What is wrong with a request is said in a sentence that names the field, in the same words over both interfaces."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Mapping

import grpc
import httpx
import pytest

from actors.validation import ContextExceeded
from engine.request import RequestRejected
from herder.v1 import inference_pb2 as pb
from herder.v1.inference_pb2_grpc import InferenceServiceStub
from herder.v1.types_pb2 import Grammar, SamplingParams, TokenIds
from tests.gateway.fakes import FakeEngine

# HTTP fields beside a prompt of one token; sampling and other fields of GenerateRequest; field, sentence.
BOTH = [
    ({"model": "other"}, {"model": "other"}, "model", "model 'other' does not exist; this server has 'tiny'"),
    (
        {"prompt": [1] * 70},
        {"token_ids": TokenIds(ids=[1] * 70)},
        "prompt",
        "prompt has 70 tokens, which leaves no room for an answer in the model's context of 64 tokens",
    ),
    (
        {"max_tokens": 64},
        {"sampling": SamplingParams(max_tokens=64)},
        "max_tokens",
        "max_tokens is 64 and the prompt has 1 tokens: together 65, more than the model's context of 64 tokens",
    ),
    (
        {"prompt": [1, 300]},
        {"token_ids": TokenIds(ids=[1, 300])},
        "prompt",
        "prompt has token id 300 at position 1, outside the vocabulary (0 to 299)",
    ),
    (
        {"temperature": -1.0},
        {"sampling": SamplingParams(temperature=-1.0)},
        "temperature",
        "temperature must be between 0 and 100, not -1.0",
    ),
    ({"top_p": 0.0}, {"sampling": SamplingParams(top_p=0.0)}, "top_p", "top_p must be above 0 and at most 1, not 0.0"),
    ({"min_p": 2.0}, {"sampling": SamplingParams(min_p=2.0)}, "min_p", "min_p must be between 0 and 1, not 2.0"),
    ({"prompt": []}, {"token_ids": TokenIds()}, "prompt", "prompt must not be empty"),
    (
        {"min_tokens": 9, "max_tokens": 3},
        {"sampling": SamplingParams(min_tokens=9, max_tokens=3)},
        "min_tokens",
        "min_tokens must be between 0 and max_tokens (3), not 9",
    ),
    (
        {"logprobs": 21},
        {"sampling": SamplingParams(logprobs=21)},
        "logprobs",
        "logprobs must be between 0 and 20, not 21",
    ),
    (
        {"stop": ["x"] * 17},
        {"sampling": SamplingParams(stop=["x"] * 17)},
        "stop",
        "stop must be at most 16 strings, not 17",
    ),
    (
        {"stop_token_ids": [5, 999]},
        {"sampling": SamplingParams(stop_token_ids=[5, 999])},
        "stop_token_ids",
        "stop_token_ids has token id 999 at position 1, outside the vocabulary (0 to 299)",
    ),
    ({"n": 17}, {"sampling": SamplingParams(n=17)}, "n", "n must be between 1 and 16, not 17"),
    ({"n": 0}, {"sampling": SamplingParams(n=0)}, "n", "n must be between 1 and 16, not 0"),
    (
        {"repetition_penalty": 0.0},
        {"sampling": SamplingParams(repetition_penalty=0.0)},
        "repetition_penalty",
        "repetition_penalty must be above 0 and at most 100, not 0.0",
    ),
    (
        {"presence_penalty": 2.5},
        {"sampling": SamplingParams(presence_penalty=2.5)},
        "presence_penalty",
        "presence_penalty must be between -2 and 2, not 2.5",
    ),
    (
        {"logit_bias": {"300": 1}},
        {"sampling": SamplingParams(logit_bias={300: 1})},
        "logit_bias",
        "logit_bias has token id 300, outside the vocabulary (0 to 299)",
    ),
    (
        {"logit_bias": {"5": 101}},
        {"sampling": SamplingParams(logit_bias={5: 101})},
        "logit_bias",
        "logit_bias of token 5 must be between -100 and 100, not 101.0",
    ),
    (
        {"request_id": "a b"},
        {"request_id": "a b"},
        "request_id",
        "request_id must be at most 128 letters, digits and _ . : - characters",
    ),
]
CHAT = [
    ({"messages": []}, "messages", "messages must not be empty"),
    (
        {"messages": [{"role": "king", "content": "Hi"}]},
        "messages",
        "messages: role must be system, developer, user, assistant or tool, not 'king'",
    ),
]
HTTP_COMPLETIONS = [
    ({"prompt": None}, "prompt", "prompt: field required"),
    (
        {"prompt": ["a", 1]},
        "prompt",
        "prompt must be a string, a list of strings, a list of token ids or a list of lists of token ids",
    ),
    ({"prompt": [[1], []]}, "prompt", "prompt must not be empty"),
    ({"prompt": [-1]}, "prompt", "prompt has token id -1 at position 0, outside the vocabulary (0 to 299)"),
    ({"tempreture": 1}, "tempreture", "tempreture is not a known field; the nearest is temperature"),
    ({"temperature": "hot"}, "temperature", "temperature: input should be a valid number"),
    ({"max_tokens": -1}, "max_tokens", "max_tokens must be 0 or more, not -1"),
    ({"best_of": 3}, "best_of", "best_of must be equal to n: all answers are given"),
    ({"suffix": "x"}, "suffix", "suffix is not supported here"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "logit_bias: 'x' is no token id"),
    ({"logit_bias": {"5": "x"}}, "logit_bias", "logit_bias of token 5 must be a number"),
    ({"logit_bias": [5]}, "logit_bias", "logit_bias must be an object of token ids and numbers"),
    ({"priority": 2**31}, "priority", "priority: input should be less than 2147483648"),
    ({"timeout": 0}, "timeout", "timeout must be a number of seconds above 0, not 0.0"),
    (
        {"prompt_logprobs": 1, "stream": True},
        "prompt_logprobs",
        "prompt_logprobs cannot be used when stream is true",
    ),
    (
        {"guided_regex": "a"},
        "guided_regex",
        'guided_regex is not supported here; use structured_outputs: {"regex": ...}',
    ),
    (
        {"structured_outputs": {"regex": "a", "choice": ["a"]}},
        "structured_outputs",
        "structured_outputs must have exactly one of json, json_object, regex, choice, grammar",
    ),
    (
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "structured_outputs",
        "structured_outputs cannot be used together with response_format",
    ),
    ({"response_format": {"type": "json_schema"}}, "response_format", "response_format needs a json_schema"),
    (
        {"response_format": {"type": "xml"}},
        "response_format",
        "response_format.type: input should be 'text', 'json_object' or 'json_schema'",
    ),
    ({"seed": 2**63}, "seed", f"seed must be a 64-bit integer, not {2**63}"),
    ({"stream_options": {}}, "stream_options", "stream_options is only allowed when stream is true"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids", "stop_token_ids[0]: input should be a valid integer"),
]
HTTP_CHAT = [
    (
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "messages",
        "messages: content of type 'input_audio' is not supported here",
    ),
    (
        {"messages": [{"role": "user", "content": 1}]},
        "messages",
        "messages: content must be a string or a list of parts",
    ),
    ({"messages": [{"role": "user"}]}, "messages", "messages[0].content: field required"),
    ({"messages": "Hi"}, "messages", "messages: input should be a valid list"),
    ({"top_logprobs": 3}, "top_logprobs", "top_logprobs needs logprobs to be true"),
]


def check_http(response: httpx.Response, field: str | None, sentence: str) -> None:
    assert response.status_code == (404 if field == "model" else 400), response.text
    error = response.json()["error"]
    assert (error["message"], error["param"], error["type"]) == (sentence, field, "invalid_request_error")


async def check_grpc(call: grpc.aio.UnaryUnaryCall | grpc.aio.UnaryStreamCall, field: str, sentence: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if isinstance(call, grpc.aio.UnaryStreamCall):
            async for _ in call:
                pass
        else:
            await call
    code = grpc.StatusCode.NOT_FOUND if field == "model" else grpc.StatusCode.INVALID_ARGUMENT
    assert (caught.value.code(), caught.value.details()) == (code, sentence)


@pytest.mark.parametrize(("over_http", "over_grpc", "field", "sentence"), BOTH)
async def test_completions(
    over_http: Mapping[str, object],
    over_grpc: Mapping[str, object],
    field: str,
    sentence: str,
    asgi: httpx.AsyncClient,
    inference: InferenceServiceStub,
    engine: FakeEngine,
) -> None:
    for stream in (False, True):
        body = {"prompt": [1], "stream": stream, **over_http}
        check_http(await asgi.post("/v1/completions", json=body), field, sentence)
    fields = {"token_ids": TokenIds(ids=[1]), **over_grpc}
    await check_grpc(inference.Generate(pb.GenerateRequest(**fields)), field, sentence)
    await check_grpc(inference.GenerateStream(pb.GenerateStreamRequest(**fields)), field, sentence)
    assert engine.requests == []


@pytest.mark.parametrize(("body", "field", "sentence"), CHAT)
async def test_chat(
    body: dict[str, list[dict[str, str]]],
    field: str,
    sentence: str,
    asgi: httpx.AsyncClient,
    inference: InferenceServiceStub,
) -> None:
    check_http(await asgi.post("/v1/chat/completions", json=body), field, sentence)
    messages = [
        pb.ChatMessage(role=message["role"], content=[pb.ContentPart(text=message["content"])])
        for message in body["messages"]
    ]
    await check_grpc(inference.Chat(pb.ChatRequest(messages=messages)), field, sentence)
    await check_grpc(inference.ChatStream(pb.ChatStreamRequest(messages=messages)), field, sentence)


@pytest.mark.parametrize(("body", "field", "sentence"), HTTP_COMPLETIONS)
async def test_http_completions(body: dict[str, object], field: str, sentence: str, asgi: httpx.AsyncClient) -> None:
    check_http(await asgi.post("/v1/completions", json={"prompt": [1], **body}), field, sentence)


@pytest.mark.parametrize(("body", "field", "sentence"), HTTP_CHAT)
async def test_http_chat(body: dict[str, object], field: str, sentence: str, asgi: httpx.AsyncClient) -> None:
    fields = {"messages": [{"role": "user", "content": "Hi"}], **body}
    check_http(await asgi.post("/v1/chat/completions", json=fields), field, sentence)


async def test_codes_that_clients_look_for(asgi: httpx.AsyncClient) -> None:
    long = (await asgi.post("/v1/completions", json={"prompt": [1] * 70})).json()["error"]
    assert long["code"] == "context_length_exceeded"
    unknown = (await asgi.post("/v1/completions", json={"prompt": [1], "model": "other"})).json()["error"]
    assert unknown["code"] == "model_not_found"


async def test_bodies_that_are_no_requests(asgi: httpx.AsyncClient) -> None:
    response = await asgi.post("/v1/completions", content=b'{"prompt": ')
    check_http(response, None, "the body is not valid JSON: Expecting value")
    check_http(await asgi.post("/v1/completions", content=b"[1]"), None, "the body must be a JSON object")
    check_http(await asgi.post("/v1/completions"), None, "the body must be a JSON object")
    missing = await asgi.get("/v1/nothing")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "invalid_request_error")
    assert missing.json()["error"]["message"] == "there is no GET /v1/nothing"
    wrong = await asgi.get("/v1/completions")
    assert (wrong.status_code, wrong.json()["error"]["message"]) == (405, "GET is not allowed at /v1/completions")


async def test_fields_that_ask_for_nothing_are_taken(asgi: httpx.AsyncClient) -> None:
    body = {
        "prompt": "Hi", "user": "me", "metadata": {"a": "b"}, "store": False, "n": 1, "best_of": 1, "logit_bias": {},
        "presence_penalty": 0, "frequency_penalty": 0.0, "logprobs": None, "stop": None, "suffix": None, "top_k": -1,
    }  # fmt: skip
    assert (await asgi.post("/v1/completions", json=body)).status_code == 200


async def test_grpc_only(inference: InferenceServiceStub) -> None:
    await check_grpc(inference.Generate(pb.GenerateRequest()), "prompt", "prompt must be text or token_ids")
    empty_part = pb.ChatMessage(role="user", content=[pb.ContentPart()])
    sentence = "messages: a content part must have a text or an image"
    await check_grpc(inference.Chat(pb.ChatRequest(messages=[empty_part])), "messages", sentence)
    await check_grpc(inference.Tokenize(pb.TokenizeRequest()), "input", "input must be text or chat")
    for grammar, sentence in (
        (Grammar(), "grammar must have a kind"),
        (Grammar(regex=""), "grammar: regex must not be empty"),
        (Grammar(choice={}), "grammar: choice must not be empty"),
    ):
        bad = pb.GenerateRequest(text="Hi", sampling=SamplingParams(grammar=grammar))
        await check_grpc(inference.Generate(bad), "grammar", sentence)
    late = pb.GenerateRequest(text="Hi", options=pb.RequestOptions(timeout_s=-1))
    sentence = "timeout_s must be a number of seconds above 0, not -1.0"
    await check_grpc(inference.Generate(late), "timeout_s", sentence)


async def test_a_running_stream_is_untouched(
    asgi: httpx.AsyncClient, inference: InferenceServiceStub, engine: FakeEngine
) -> None:
    engine.delay = 0.01

    async def good() -> str:
        call = inference.GenerateStream(pb.GenerateStreamRequest(text="Hi"))
        return "".join([event.tokens.text async for event in call])

    async def bad() -> None:
        for over_http, over_grpc, _, _ in BOTH:
            assert (await asgi.post("/v1/completions", json={"prompt": [1], **over_http})).status_code in (400, 404)
            with pytest.raises(grpc.aio.AioRpcError):
                await inference.Generate(pb.GenerateRequest(**{"token_ids": TokenIds(ids=[1]), **over_grpc}))

    answers = await asyncio.gather(good(), bad(), good())
    assert [answers[0], answers[2]] == ["Hello wörld"] * 2
    assert engine.closed_early == []


def test_rejections_cross_processes() -> None:
    for error in (ContextExceeded("prompt is long", field="prompt"), RequestRejected("no", field="x")):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.field, again.code) == (type(error), str(error), error.field, error.code)
