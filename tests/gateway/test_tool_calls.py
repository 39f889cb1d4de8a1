"""Tools: offered, called, forced, streamed; over both interfaces."""

from __future__ import annotations

import json

import httpx
import openai
import pytest

from engine.tokenizer import Tokenizer
from herder.v1 import inference_pb2 as pb
from herder.v1 import types_pb2
from herder.v1.inference_pb2_grpc import InferenceServiceStub
from tests.gateway.fakes import MODEL, FakeEngine
from tests.gateway.test_bad_input import check_grpc, check_http
from tests.gateway.test_http import events

PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}}
FUNCTIONS = [{"name": "f", "description": "Does f.", "parameters": PARAMETERS}, {"name": "g"}]
TOOLS = [{"type": "function", "function": function} for function in FUNCTIONS]
PB_TOOLS = pb.Tools(
    definitions=[
        pb.ToolDefinition(name="f", description="Does f.", parameters=json.dumps(PARAMETERS)),
        pb.ToolDefinition(name="g"),
    ]
)
HI = [{"role": "user", "content": "Hi"}]
PB_HI = [pb.ChatMessage(role="user", content=[pb.ContentPart(text="Hi")])]
# What the model writes; the content and the calls that it comes to.
ANSWERS = [
    ('[f(a=1, b="x")]', "", [("f", {"a": 1, "b": "x"})]),
    ("Well: [f(a=1), g()]", "Well: ", [("f", {"a": 1}), ("g", {})]),
    ('{"name": "f", "parameters": {"a": 2}}', "", [("f", {"a": 2})]),
    ("Hello wörld", "Hello wörld", []),
    ("[h(a=1)]", "[h(a=1)]", []),
    ("[f(a=", "[f(a=", []),
]


def write(engine: FakeEngine, tokenizer: Tokenizer, text: str) -> None:
    engine.answer = (*tokenizer.encode(text, add_special_tokens=False), *tokenizer.eos_token_ids)


@pytest.mark.parametrize(("text", "content", "calls"), ANSWERS)
async def test_calls_through_the_client(
    client: openai.AsyncOpenAI,
    engine: FakeEngine,
    tokenizer: Tokenizer,
    text: str,
    content: str,
    calls: list[tuple[str, dict[str, object]]],
) -> None:
    write(engine, tokenizer, text)
    answer = await client.chat.completions.create(model=MODEL, messages=HI, tools=TOOLS)
    (choice,) = answer.choices
    assert (choice.message.content or "").strip() == content.strip()
    found = choice.message.tool_calls or []
    assert [(call.function.name, json.loads(call.function.arguments)) for call in found] == calls
    assert choice.finish_reason == ("tool_calls" if calls else "stop")
    assert len({call.id for call in found}) == len(calls)
    assert all(call.type == "function" for call in found)
    # As a stream, the client puts the same together.
    async with client.chat.completions.stream(model=MODEL, messages=HI, tools=TOOLS) as stream:
        streamed = (await stream.get_final_completion()).choices[0]
    assert (streamed.message.content or "").strip() == content.strip()
    found = streamed.message.tool_calls or []
    assert [(call.function.name, json.loads(call.function.arguments)) for call in found] == calls
    assert streamed.finish_reason == choice.finish_reason


@pytest.mark.parametrize(("text", "content", "calls"), ANSWERS)
async def test_calls_over_grpc(
    inference: InferenceServiceStub,
    engine: FakeEngine,
    tokenizer: Tokenizer,
    text: str,
    content: str,
    calls: list[tuple[str, dict[str, object]]],
) -> None:
    write(engine, tokenizer, text)
    (choice,) = (await inference.Chat(pb.ChatRequest(messages=PB_HI, tools=PB_TOOLS))).choices
    assert choice.text.strip() == content.strip()
    assert [(call.name, json.loads(call.arguments)) for call in choice.tool_calls] == calls
    reason = types_pb2.FINISH_REASON_TOOL_CALLS if calls else types_pb2.FINISH_REASON_STOP
    assert choice.finish_reason == reason
    stream = [event async for event in inference.ChatStream(pb.ChatStreamRequest(messages=PB_HI, tools=PB_TOOLS))]
    assert "".join(event.tokens.text for event in stream) == choice.text
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for delta in (delta for event in stream for delta in event.tokens.tool_calls):
        names[delta.index] = names.get(delta.index, "") + delta.name
        arguments[delta.index] = arguments.get(delta.index, "") + delta.arguments
    assert [(names[i], json.loads(arguments[i])) for i in sorted(names)] == calls
    assert stream[-1].finished.finish_reason == reason


async def test_chunks_have_openais_shape(http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    write(engine, tokenizer, "[f(a=1), g()]")
    chunks = await events(http, "/v1/chat/completions", {"messages": HI, "tools": TOOLS})
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    entries = [entry for chunk in chunks for entry in chunk["choices"][0]["delta"].get("tool_calls", [])]
    first = [entry for entry in entries if entry["index"] == 0]
    assert first[0]["id"].startswith("call_") and first[0]["type"] == "function"
    assert first[0]["function"]["name"] == "f"
    assert json.loads("".join(entry["function"]["arguments"] for entry in first)) == {"a": 1}
    assert {entry["index"] for entry in entries} == {0, 1}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


NAMED = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("http_choice", "grpc_choice", "forced"),
    [
        ("auto", {"mode": pb.TOOL_CHOICE_MODE_AUTO}, False),
        ("none", {"mode": pb.TOOL_CHOICE_MODE_NONE}, False),
        ("required", {"mode": pb.TOOL_CHOICE_MODE_REQUIRED}, True),
        (NAMED, {"name": "f"}, True),
    ],
)
async def test_tool_choice(
    asgi: httpx.AsyncClient,
    inference: InferenceServiceStub,
    engine: FakeEngine,
    tokenizer: Tokenizer,
    http_choice: object,
    grpc_choice: dict[str, object],
    forced: bool,
) -> None:
    write(engine, tokenizer, "[f(a=1)]")
    body = {"messages": HI, "tools": TOOLS, "tool_choice": http_choice}
    message = (await asgi.post("/v1/chat/completions", json=body)).json()["choices"][0]["message"]
    tools = pb.Tools(definitions=PB_TOOLS.definitions, **grpc_choice)
    (choice,) = (await inference.Chat(pb.ChatRequest(messages=PB_HI, tools=tools))).choices
    called = http_choice != "none"
    assert bool(message.get("tool_calls")) == bool(choice.tool_calls) == called
    assert (message["content"], choice.text) == ((None, "") if called else ("[f(a=1)]", "[f(a=1)]"))
    over_http, over_grpc = engine.requests
    assert over_http.grammar == over_grpc.grammar
    assert (over_http.grammar is not None) == forced
    # The template of the tests writes the tools' names into the prompt; with "none" they are left out.
    assert over_http.prompt_token_ids == over_grpc.prompt_token_ids
    assert ("fg" in tokenizer.decode(over_http.prompt_token_ids)) == called


async def test_one_call_at_most(
    asgi: httpx.AsyncClient, inference: InferenceServiceStub, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    write(engine, tokenizer, "[f(a=1), g()]")
    body = {"messages": HI, "tools": TOOLS, "parallel_tool_calls": False}
    message = (await asgi.post("/v1/chat/completions", json=body)).json()["choices"][0]["message"]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["f"]
    tools = pb.Tools(definitions=PB_TOOLS.definitions, parallel_calls=False)
    (choice,) = (await inference.Chat(pb.ChatRequest(messages=PB_HI, tools=tools))).choices
    assert [call.name for call in choice.tool_calls] == ["f"]


async def test_a_conversation_with_calls_and_results(
    asgi: httpx.AsyncClient, inference: InferenceServiceStub, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
    ]
    response = await asgi.post("/v1/chat/completions", json={"messages": messages, "tools": TOOLS})
    assert response.status_code == 200, response.text
    rpc = [
        *PB_HI,
        pb.ChatMessage(role="assistant", tool_calls=[pb.ToolCall(id="c1", name="f", arguments='{"a": 1}')]),
        pb.ChatMessage(role="tool", tool_call_id="c1", content=[pb.ContentPart(text="42")]),
    ]
    await inference.Chat(pb.ChatRequest(messages=rpc, tools=PB_TOOLS))
    assert engine.requests[0].prompt_token_ids == engine.requests[1].prompt_token_ids
    conversation = pb.Conversation(messages=rpc, tools=PB_TOOLS)
    tokenized = await inference.Tokenize(pb.TokenizeRequest(chat=conversation))
    assert tuple(tokenized.token_ids) == engine.requests[0].prompt_token_ids
    assert "42" in tokenizer.decode(tokenized.token_ids)
    again = await asgi.post("/tokenize", json={"messages": messages, "tools": TOOLS})
    assert tuple(again.json()["tokens"]) == engine.requests[0].prompt_token_ids


BAD = [
    ({"tools": [{}]}, "tools", "tools[0].type: field required"),
    ({"tools": [TOOLS[1], TOOLS[1]]}, "tools", "tools: two of them have the same name"),
    ({"tool_choice": "required"}, "tool_choice", "tool_choice needs tools"),
    (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "h"}}},
        "tool_choice",
        "tool_choice: 'h' is none of the tools",
    ),
    (
        {"tools": TOOLS, "tool_choice": "maybe"},
        "tool_choice",
        'tool_choice must be "auto", "none", "required" or {"type": "function", "function": {"name": ...}}',
    ),
    (
        {"tools": TOOLS, "response_format": {"type": "json_object"}},
        "response_format",
        "response_format cannot be used together with tools, unless tool_choice is none",
    ),
    (
        {
            "messages": [
                *HI,
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
            ]
        },
        "messages",
        "messages: the arguments of a tool call must be a JSON object",
    ),
    ({"functions": [{}]}, "functions", "functions is not supported here"),
]


@pytest.mark.parametrize(("body", "field", "sentence"), BAD)
async def test_bad_tools(asgi: httpx.AsyncClient, body: dict[str, object], field: str, sentence: str) -> None:
    check_http(await asgi.post("/v1/chat/completions", json={"messages": HI, **body}), field, sentence)


async def test_bad_tools_over_grpc(inference: InferenceServiceStub) -> None:
    def ask(**tools: object) -> object:
        return inference.Chat(pb.ChatRequest(messages=PB_HI, tools=pb.Tools(**tools)))

    await check_grpc(ask(name="f"), "tool_choice", "tool_choice needs tools")
    await check_grpc(ask(mode=77), "tool_choice", "tool_choice: there is no mode 77")
    bad = [pb.ToolDefinition(name="f", parameters="[1]")]
    await check_grpc(ask(definitions=bad), "tools", "tools: parameters must be a JSON object")
