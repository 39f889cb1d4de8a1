"""Whatever is sent: an answer in form, never a failure inside the server, and no harm to another request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import grpc
import httpx
from google.protobuf import descriptor as pd
from google.protobuf import message_factory
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.http_chat_schema import ChatBody
from actors.http_inspect import DetokenizeBody, TokenizeBody
from actors.http_schema import CompletionBody
from engine.tokenizer import Tokenizer
from herder.v1 import control_pb2, inference_pb2
from herder.v1.inference_pb2_grpc import InferenceServiceStub
from tests.gateway.fakes import IMAGE_TOKENS, FakeEngine
from tests.gateway.pictures import data_url, picture
from tests.gateway.test_tool_calls import TOOLS

SCHEMAS: list[object] = [
    {"type": "text"},
    {"type": "json_object"},
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
]
FUZZ = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
TEXT = st.text(max_size=6) | st.sampled_from(
    ["Hi", "f", "user", "tool", "assistant", "auto", "\ud800", "", "-1", "text"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.integers(-2, 20) | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
PATHS = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}
# Values that are nearly right, by field: bodies of these get far.
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
IMAGE_URLS = TEXT | st.sampled_from(
    [data_url(picture()), data_url(picture(16, 8)), data_url(picture()[:60]), "data:image/png;base64,", "http://a/b"]
)
PARTS = (
    st.just({"type": "text", "text": "Hi"})
    | st.sampled_from([*IMAGE_TOKENS, "<|image"]).map(lambda text: {"type": "text", "text": text})
    | st.fixed_dictionaries(
        {"type": st.just("image_url"), "image_url": st.fixed_dictionaries({"url": IMAGE_URLS}) | JSON}
    )
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool", "system", "king"])},
        optional={
            "content": st.none() | TEXT | st.lists(PARTS, max_size=3) | JSON,
            "tool_calls": st.just([CALL]) | JSON,
            "tool_call_id": TEXT,
        },
    ),
    max_size=3,
)
NEARLY: dict[str, st.SearchStrategy[object]] = {
    "prompt": TEXT | st.lists(st.integers(-1, 301), max_size=70) | st.lists(TEXT, max_size=3),
    "messages": MESSAGES,
    "tokens": st.lists(st.integers(-1, 301), max_size=9),
    "model": st.just("tiny"),
    "stream": st.booleans(),
    "n": st.integers(-1, 4),
    "logit_bias": st.dictionaries(
        st.sampled_from(["1", "299", "300", "-1", "x", "\u0661"]), st.floats() | JSON, max_size=3
    ),
    "tools": st.just(TOOLS)
    | st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": JSON}), max_size=2),
    "tool_choice": st.sampled_from(["auto", "none", "required"]) | JSON,
    "response_format": st.sampled_from(SCHEMAS) | st.fixed_dictionaries({"type": TEXT | st.just("json_schema")}),
    "structured_outputs": st.dictionaries(
        st.sampled_from(["json", "json_object", "regex", "choice", "grammar"]), JSON, max_size=2
    ),
    "timeout": st.floats(-1, 100) | st.floats(),
    "stream_options": st.just({"include_usage": True}),
}


def bodies(path: str) -> st.SearchStrategy[dict[str, object]]:
    """Bodies of this route's fields, right, nearly right and wrong, and now and then one that it does not know."""
    values = {name: NEARLY.get(name, JSON) | JSON for name in PATHS[path].model_fields}
    needed = {name: NEARLY[name] for name in ("prompt", "messages", "tokens") if name in values}
    some = st.dictionaries(st.sampled_from([*values, "xyz"]), st.none(), max_size=5).flatmap(
        lambda names: st.fixed_dictionaries({name: values.get(name, JSON) for name in names})
    )
    one = st.sampled_from(sorted(needed)).flatmap(lambda name: st.fixed_dictionaries({name: needed[name]}))
    return st.tuples(one, some).map(lambda parts: {**parts[1], **parts[0]}) | some


REQUESTS = st.sampled_from(sorted(PATHS)).flatmap(lambda path: st.tuples(st.just(path), bodies(path)))


async def send(asgi: httpx.AsyncClient, path: str, body: object) -> None:
    response = await asgi.post(path, content=json.dumps(body))
    assert response.status_code in (200, 400, 404, 504), (path, body, response.text)
    if response.status_code != 200:
        assert response.json()["error"]["message"]
    elif "event-stream" in response.headers["content-type"]:
        assert response.text.endswith("data: [DONE]\n\n")
        assert '"code":"internal"' not in response.text
    else:
        response.json()


async def unharmed(engine: FakeEngine, tokenizer: Tokenizer, asgi: httpx.AsyncClient, disturb: Callable) -> None:  # type: ignore[type-arg]
    """`disturb` while another request runs, which then has its whole answer."""
    engine.delay = 0.001
    good = asyncio.create_task(asgi.post("/v1/completions", json={"prompt": "good", "request_id": "good"}))
    await asyncio.sleep(0)
    await disturb()
    response = await good
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["text"] == "Hello wörld"
    assert not engine.running


@FUZZ
@given(sent=REQUESTS)
async def test_http(
    sent: tuple[str, dict[str, object]], asgi: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    await unharmed(engine, tokenizer, asgi, lambda: send(asgi, *sent))


@FUZZ
@given(path=st.sampled_from(sorted(PATHS)), body=JSON.map(json.dumps) | TEXT | st.just("[" * 100_000))
async def test_any_body(path: str, body: str, asgi: httpx.AsyncClient) -> None:
    response = await asgi.post(path, content=body.encode(errors="surrogatepass"))
    assert response.status_code in (200, 400, 404), response.text
    assert response.status_code == 200 or response.json()["error"]["message"]


# ---- gRPC

INTEGERS = {
    pd.FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    pd.FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    pd.FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    pd.FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    pd.FieldDescriptor.CPPTYPE_ENUM: (-1, 5),
}
GRPC_TEXT = st.text(max_size=5) | st.sampled_from(
    ["Hi", "tiny", "f", "user", "tool", "assistant", '{"a": 1}', "{", "[ab]"]
)


def scalar(field: pd.FieldDescriptor) -> st.SearchStrategy[object]:
    if field.cpp_type in INTEGERS:
        low, high = INTEGERS[field.cpp_type]
        return st.integers(max(low, -1), min(high, 9)) | st.integers(low, high)
    if field.cpp_type == pd.FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if field.type == pd.FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=9) | st.sampled_from([picture(), picture(16, 8), picture()[:60]])
    if field.cpp_type == pd.FieldDescriptor.CPPTYPE_STRING:
        return GRPC_TEXT
    return st.floats() | st.floats(0, 1)


@st.composite
def fields(draw: st.DrawFn, kind: pd.Descriptor) -> dict[str, object]:
    """Some fields of a message, as its constructor takes them."""
    found: dict[str, object] = {}
    for field in kind.fields:
        if not draw(st.booleans()) or (
            field.containing_oneof and any(f.name in found for f in field.containing_oneof.fields)
        ):
            continue
        inner = field.message_type
        if inner is not None and inner.GetOptions().map_entry:
            key, value = (scalar(inner.fields_by_name[name]) for name in ("key", "value"))
            found[field.name] = draw(st.dictionaries(key, value, max_size=2))
            continue
        one = scalar(field) if inner is None else fields(inner)
        found[field.name] = draw(st.lists(one, max_size=2)) if field.is_repeated else draw(one)
    return found


METHODS = [
    method
    for module, service in ((inference_pb2, "InferenceService"), (control_pb2, "ControlService"))
    for method in module.DESCRIPTOR.services_by_name[service].methods
    if method.name not in ("Abort", "Drain")  # these may end another request, as they should
]
CALLS = st.sampled_from(METHODS).flatmap(lambda method: st.tuples(st.just(method), fields(method.input_type)))
REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}


async def call(channel: grpc.aio.Channel, method: pd.MethodDescriptor, values: dict[str, object]) -> None:
    request: Message = message_factory.GetMessageClass(method.input_type)(**values)
    path = f"/{method.containing_service.full_name}/{method.name}"
    parse = message_factory.GetMessageClass(method.output_type).FromString
    try:
        if method.server_streaming:
            stub = channel.unary_stream(path, Message.SerializeToString, parse)
            last = [event async for event in stub(request)][-1]
            assert last.WhichOneof("event") == "finished" or last.error.message == "the request's deadline has passed"
        else:
            await channel.unary_unary(path, Message.SerializeToString, parse)(request)
    except grpc.aio.AioRpcError as error:
        assert error.code() in REFUSALS and error.details(), (method.name, request, error)


@FUZZ
@given(called=CALLS)
async def test_grpc(
    called: tuple[pd.MethodDescriptor, dict[str, object]],
    channel: grpc.aio.Channel,
    asgi: httpx.AsyncClient,
    engine: FakeEngine,
    tokenizer: Tokenizer,
) -> None:
    await unharmed(engine, tokenizer, asgi, lambda: call(channel, *called))


async def test_the_fuzz_reaches_the_engine(
    inference: InferenceServiceStub, asgi: httpx.AsyncClient, engine: FakeEngine
) -> None:
    """What the strategies build on is valid, so the above is not about refusals alone."""
    shown = [{"type": "image_url", "image_url": {"url": data_url(picture())}}]
    await send(asgi, "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS})
    await send(asgi, "/v1/chat/completions", {"messages": [{"role": "user", "content": shown}]})
    for schema in SCHEMAS:
        await send(asgi, "/v1/completions", {"prompt": "Hi", "response_format": schema})
    assert len(engine.requests) == 2 + len(SCHEMAS)
