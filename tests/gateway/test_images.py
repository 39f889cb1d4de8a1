"""Images in conversations: where their tokens go, what the engine gets of them, and those that are refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.gateway_core import GatewayCore
from actors.image_prompt import ImagePart, template_content
from actors.model_info import ModelInfo
from engine.images import image_digest
from engine.tokenizer import Tokenizer
from herder.v1 import inference_pb2 as pb
from herder.v1.control_pb2 import GetModelInfoRequest
from herder.v1.control_pb2_grpc import ControlServiceStub
from herder.v1.inference_pb2_grpc import InferenceServiceStub
from tests.gateway.conftest import serve_grpc
from tests.gateway.fakes import IMAGE_TOKENS, MODEL, FakeEngine, image_spec
from tests.gateway.pictures import BLUE, RED, WIDE, Turn, asking, data_url, over_grpc, over_http

ONE_TILE = "<|image_start|><|image|><|patch|><|patch|><|image_end|>"
TWO_TILES = (
    "<|image_start|><|patch|><|patch|><|tile_x_separator|><|patch|><|patch|><|tile_y_separator|>"
    "<|image|><|patch|><|patch|><|image_end|>"
)
CONVERSATION: Sequence[Turn] = [
    ("system", ["S"]),
    ("user", ["a", "b", RED, "c", WIDE, BLUE]),
    ("assistant", ["d"]),
    ("user", [RED, "e"]),
]
RENDERED = (
    "<|begin_of_text|><|header_start|>system<|header_end|>S<|eot|>"
    f"<|header_start|>user<|header_end|>ab{ONE_TILE}c{TWO_TILES}{ONE_TILE}<|eot|>"
    "<|header_start|>assistant<|header_end|>d<|eot|>"
    f"<|header_start|>user<|header_end|>{ONE_TILE}e<|eot|>"
    "<|header_start|>assistant<|header_end|>"
)


@pytest.fixture(autouse=True)
def roomy(core: GatewayCore) -> None:
    core.model = ModelInfo(MODEL, 1000, core.model.vocab_size, core.model.eos_token_ids)


def check_prompt(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    """The engine's last request is CONVERSATION."""
    request, spec = engine.requests[-1], image_spec(tokenizer)
    assert request.prompt_token_ids == tuple(tokenizer.encode(RENDERED, add_special_tokens=False))
    files = (RED, WIDE, BLUE, RED)
    assert engine.images[-1] == files
    assert [place.digest for place in request.images] == [image_digest(file, spec) for file in files]
    shown = [tokenizer.decode(request.prompt_token_ids[p.start : p.stop], False) for p in request.images]
    assert shown == [ONE_TILE, TWO_TILES, ONE_TILE, ONE_TILE]


async def test_the_prompt_and_its_images(
    asgi: httpx.AsyncClient,
    inference: InferenceServiceStub,
    core: GatewayCore,
    engine: FakeEngine,
    tokenizer: Tokenizer,
) -> None:
    """Both interfaces give the engine what the text, written out, would."""
    for detail in ({}, {"detail": "auto"}, {"detail": "low"}, {"detail": "high"}, {"detail": None}):
        body = {"messages": over_http(CONVERSATION, **detail)}
        answer = (await asgi.post("/v1/chat/completions", json=body)).json()
        assert answer["choices"][0]["message"]["content"] == "Hello wörld", answer
        check_prompt(engine, tokenizer)
    prompt = len(tokenizer.encode(RENDERED, add_special_tokens=False))
    assert answer["usage"]["prompt_tokens"] == prompt
    assert (await asgi.post("/tokenize", json=body)).json()["count"] == prompt

    messages = over_grpc(CONVERSATION)
    reply = await inference.Chat(pb.ChatRequest(messages=messages))
    assert (reply.choices[0].text, reply.usage.prompt_tokens) == ("Hello wörld", prompt)
    check_prompt(engine, tokenizer)
    stream = inference.ChatStream(pb.ChatStreamRequest(messages=messages))
    assert "".join([event.tokens.text async for event in stream]) == "Hello wörld"
    check_prompt(engine, tokenizer)
    tokenized = await inference.Tokenize(pb.TokenizeRequest(chat=pb.Conversation(messages=messages)))
    assert len(tokenized.token_ids) == prompt


async def test_grpc_takes_data_urls(inference: InferenceServiceStub, engine: FakeEngine) -> None:
    await inference.Chat(asking("a", RED, pb.MediaItem(url=data_url(WIDE))))
    assert engine.images == [(RED, WIDE)]


async def test_several_answers_share_the_images(asgi: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = {"messages": over_http([("user", [RED])]), "n": 2}
    assert len((await asgi.post("/v1/chat/completions", json=body)).json()["choices"]) == 2
    assert engine.images == [(RED,), (RED,)]
    assert engine.requests[0].images == engine.requests[1].images != ()


async def test_openai_client(
    client: openai.AsyncOpenAI, core: GatewayCore, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    messages = over_http(CONVERSATION, detail="low")
    answer = await client.chat.completions.create(model=MODEL, messages=messages)
    assert answer.choices[0].message.content == "Hello wörld"
    check_prompt(engine, tokenizer)
    stream = await client.chat.completions.create(model=MODEL, messages=messages, stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "Hello wörld"
    check_prompt(engine, tokenizer)
    with pytest.raises(openai.BadRequestError, match="image 2: the image is empty") as caught:
        await client.chat.completions.create(model=MODEL, messages=over_http([("user", [RED, b""])]))
    assert (caught.value.param, caught.value.code) == ("messages", "invalid_value")


async def test_whether_the_model_takes_images_is_told(control: ControlServiceStub, blind_core: GatewayCore) -> None:
    assert (await control.GetModelInfo(GetModelInfoRequest())).takes_images
    async for channel in serve_grpc(blind_core):
        assert not (await ControlServiceStub(channel).GetModelInfo(GetModelInfoRequest())).takes_images


# ---- Words that look like images

WORDS = st.lists(
    st.sampled_from([*IMAGE_TOKENS, "<", "|", "image", "patch", "|>", "<|", " ", "é", "\u2060", "Hello"])
    | st.sampled_from(IMAGE_TOKENS).map(lambda name: f"{name[0]}\u2060{name[1:]}"),
    max_size=6,
).map("".join)


ALL = (  # all that there is in a conversation
    "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text if p.type == 'text' else '<|image|>' }}{% endfor %}{% endif %}"
    "{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}{{ tools | tojson }}"
)


@pytest.fixture(scope="module")
def talkative(checkpoint: Path) -> Tokenizer:
    found = Tokenizer.from_dir(checkpoint)
    assert found is not None
    found._fast.chat_template = ALL
    return found


@given(parts=st.lists(WORDS | st.none(), max_size=5), word=WORDS)
def test_nobodys_words_are_images(parts: list[str | None], word: str, talkative: Tokenizer) -> None:
    """Neither the user's (None: an image), nor those of calls, however escaped, nor those of tools."""
    spec = image_spec(talkative)
    content = template_content("user", [ImagePart("") if part is None else part for part in parts])
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in word)
    call = {"id": "c", "type": "function", "function": {"name": word, "arguments": f'{{"{escaped}": "{escaped}"}}'}}
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": word, "tool_calls": [call]}]
    tools = [{"type": "function", "function": {"name": word}}]
    pieces = talkative.encode_chat_between(messages, tools, spec.image_token_id, spec.token_ids)
    assert len(pieces) == parts.count(None) + 1
    assert not any(spec.token_ids & set(piece) for piece in pieces)
    text = "<|image|>".join(talkative.decode(piece, skip_special_tokens=False) for piece in pieces)
    assert text.replace("\u2060", "") == talkative._render(messages, tools, {}).replace("\u2060", "")


async def test_words_beside_images(
    asgi: httpx.AsyncClient, inference: InferenceServiceStub, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    for spelled in ("<|image|>", "<|patch|>", ONE_TILE):
        turns: Sequence[Turn] = [("user", [spelled[:4], spelled[4:], RED, spelled]), ("assistant", [spelled])]
        assert (await asgi.post("/v1/chat/completions", json={"messages": over_http(turns)})).status_code == 200
        await inference.Chat(pb.ChatRequest(messages=over_grpc(turns)))
        for request in engine.requests[-2:]:
            (place,) = request.images
            ids = request.prompt_token_ids
            assert tokenizer.decode(ids[place.start : place.stop], False) == ONE_TILE
            assert not image_spec(tokenizer).token_ids & {*ids[: place.start], *ids[place.stop :]}
            words = tokenizer.decode([*ids[: place.start], *ids[place.stop :]], False)
            assert words.count(spelled) == 3
