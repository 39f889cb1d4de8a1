"""The HTTP interface, mostly through the official client."""

from __future__ import annotations

import asyncio
import json

import httpx
import openai
import pytest

from actors.gateway_core import GatewayCore
from actors.status import ClusterStatus
from engine.request import ErrorCode, RequestError, RequestRejected
from engine.tokenizer import Tokenizer
from tests.gateway.fakes import MAX_CONTEXT, MODEL, FakeEngine, logprob


async def events(http: httpx.AsyncClient, path: str, body: dict[str, object]) -> list[dict]:
    """The data of a stream's events; checks that [DONE] ends it."""
    async with http.stream("POST", path, json={"stream": True, **body}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def test_models(client: openai.AsyncOpenAI) -> None:
    models = await client.models.list()
    assert [model.id for model in models.data] == [MODEL]
    assert (await client.models.retrieve(MODEL)).model_extra == {"max_model_len": MAX_CONTEXT}
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other")


async def test_health(http: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (await http.get("/health")).status_code == 200
    assert (await http.get("/health/ready")).status_code == 200
    engine.cluster = ClusterStatus(ready=False, reason="expert-1 is loading")
    response = await http.get("/health/ready")
    assert (response.status_code, response.json()["reason"]) == (503, "expert-1 is loading")
    monkeypatch.setattr(engine, "status", lambda: 1 / 0)
    response = await http.get("/health/ready")
    assert (response.status_code, response.json()["reason"]) == (503, "the controller does not answer")
    assert (await http.get("/health")).status_code == 200


async def test_completion(client: openai.AsyncOpenAI, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    answer = await client.completions.create(model=MODEL, prompt="Hi")
    choice = answer.choices[0]
    assert (answer.id[:5], choice.text, choice.finish_reason, choice.logprobs) == ("cmpl-", "Hello wörld", "stop", None)
    assert engine.requests[0].prompt_token_ids == tuple(tokenizer.encode("Hi"))
    assert engine.requests[0].params.max_tokens == 16
    assert engine.requests[0].eos_token_ids == tokenizer.eos_token_ids
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3
    assert answer.usage.completion_tokens == len(engine.answer)  # the stop token counts
    assert answer.usage.total_tokens == 3 + len(engine.answer)


async def test_sampling_reaches_the_engine(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    extra = {"top_k": 5, "min_p": 0.1, "min_tokens": 2, "ignore_eos": True, "stop_token_ids": [7]}
    await client.completions.create(
        model=MODEL, prompt=[1, 2], max_tokens=9, temperature=0.5, top_p=0.9, seed=-3, stop="zz", extra_body=extra
    )
    params = engine.requests[0].params
    assert (params.max_tokens, params.temperature, params.top_p, params.seed, params.stop) == (9, 0.5, 0.9, -3, ("zz",))
    assert (params.top_k, params.min_p, params.min_tokens, params.ignore_eos) == (5, 0.1, 2, True)
    assert (params.stop_token_ids, engine.requests[0].prompt_token_ids) == ((7,), (1, 2))


async def test_completion_stream(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    stream = await client.completions.create(
        model=MODEL, prompt="Hi", stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "Hello wörld"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [*[None] * (len(chunks) - 2), "stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(engine.answer)


@pytest.mark.parametrize("step", [1, 3, 100])
async def test_stop_strings(http: httpx.AsyncClient, engine: FakeEngine, step: int) -> None:
    engine.step = step
    body = {"prompt": "Hi", "max_tokens": 40, "ignore_eos": True, "stop": ["o wö", "never"]}
    whole = (await http.post("/v1/completions", json=body)).json()
    assert (whole["choices"][0]["text"], whole["choices"][0]["finish_reason"]) == ("Hell", "stop")
    assert whole["usage"]["completion_tokens"] == 5  # Hell, o, space, w, ö: not those after it in the same step
    chunks = await events(http, "/v1/completions", body)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Hell"
    early = step < 40  # else the engine had ended by itself
    assert engine.closed_early == [request.request_id for request in engine.requests if early]


async def test_special_tokens_and_stop_tokens_in_text(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    eot = engine.answer[-1]
    engine.answer = (*engine.answer[:1], eot, *engine.answer)
    body = {"prompt": "Hi", "max_tokens": 4, "ignore_eos": True}
    assert (await http.post("/v1/completions", json=body)).json()["choices"][0]["text"] == "HellHello"
    body["skip_special_tokens"] = False
    assert (await http.post("/v1/completions", json=body)).json()["choices"][0]["text"] == "Hell<|eot|>Hello"
    body["ignore_eos"] = False
    assert (await http.post("/v1/completions", json=body)).json()["choices"][0]["text"] == "Hell"


async def test_logprobs(http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    body = {"prompt": "Hi", "max_tokens": 6, "logprobs": 2}
    found = (await http.post("/v1/completions", json=body)).json()["choices"][0]["logprobs"]
    assert found["tokens"] == ["Hell", "o", " ", "w", "ö", "r"]
    assert found["text_offset"] == [0, 4, 5, 6, 7, 8]
    expected = [logprob(token_id, 2) for token_id in engine.answer[:6]]
    assert found["token_logprobs"] == [entry.logprob for entry in expected]
    for shown, entry in zip(found["top_logprobs"], expected, strict=True):
        assert shown == {tokenizer.token_text(i): value for i, value in entry.top}
    chunks = await events(http, "/v1/completions", body)
    for name in ("tokens", "text_offset", "token_logprobs", "top_logprobs"):
        assert [item for chunk in chunks for item in chunk["choices"][0]["logprobs"][name]] == found[name]
    zero = (await http.post("/v1/completions", json={**body, "logprobs": 0})).json()["choices"][0]["logprobs"]
    assert [list(top) for top in zero["top_logprobs"]] == [[token] for token in found["tokens"]]


async def test_echo_scores_the_prompt(http: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("Hällo")
    body = {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1, "return_tokens_as_token_ids": True}
    answer = (await http.post("/v1/completions", json=body)).json()
    found = answer["choices"][0]["logprobs"]
    assert answer["choices"][0]["text"] == "Hällo"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    assert found["tokens"] == [f"token_id:{i}" for i in prompt]
    assert found["token_logprobs"] == [None, *(logprob(i, 1).logprob for i in prompt[1:])]
    assert found["top_logprobs"] == [None, *({f"token_id:{i}": logprob(i, 1).logprob} for i in prompt[1:])]
    assert found["text_offset"] == [0, 0, 1, 1, 2, 4]  # <|begin_of_text|> H, two bytes of ä, ll, o


async def test_echo_with_an_answer(http: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    body = {"prompt": "Hi ", "max_tokens": 2, "echo": True, "logprobs": 0}
    whole = (await http.post("/v1/completions", json=body)).json()["choices"][0]
    assert whole["text"] == "Hi Hello"
    assert whole["logprobs"]["tokens"] == ["<|begin_of_text|>", "H", "i", " ", "Hell", "o"]
    assert whole["logprobs"]["text_offset"] == [0, 0, 1, 2, 3, 7]
    chunks = await events(http, "/v1/completions", body)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["Hi Hell", "o"]
    offsets = [offset for chunk in chunks for offset in chunk["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == [0, 0, 1, 2, 3, 7]
    plain = (await http.post("/v1/completions", json={"prompt": "Hi ", "max_tokens": 0, "echo": True})).json()
    assert (plain["choices"][0]["text"], plain["choices"][0]["logprobs"]) == ("Hi ", None)


@pytest.mark.parametrize("prompts", [["a", "b", "a"], [[1, 2], [3], [1, 2]]])
async def test_several_prompts(
    http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer, prompts: list[str] | list[list[int]]
) -> None:
    second = tuple(prompts[1]) if isinstance(prompts[1], list) else tuple(tokenizer.encode(prompts[1]))
    engine.answers[second] = tokenizer.encode("other", add_special_tokens=False)
    body = {"prompt": prompts, "max_tokens": 5}
    answer = (await http.post("/v1/completions", json=body)).json()
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == ["Hello wö", "other", "Hello wö"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 15
    assert [request.request_id for request in engine.requests] == [f"{answer['id']}-{i}" for i in range(3)]
    streamed = ["", "", ""]
    for chunk in await events(http, "/v1/completions", body):
        streamed[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert streamed == texts


async def test_chat(client: openai.AsyncOpenAI, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    answer = await client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
        ],
        max_completion_tokens=12,
        logprobs=True,
        top_logprobs=1,
    )
    choice = answer.choices[0]
    assert (answer.id[:9], choice.message.role, choice.message.content) == ("chatcmpl-", "assistant", "Hello wörld")
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert engine.requests[0].prompt_token_ids == tuple(tokenizer.encode_chat(turns))
    assert engine.requests[0].params.max_tokens == 12
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    first = choice.logprobs.content[0]
    assert (first.token, first.bytes, len(first.top_logprobs)) == ("Hell", list(b"Hell"), 1)
    assert len(choice.logprobs.content) == len(engine.answer)


async def test_chat_stream(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Hi"}],
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[1].choices[0].delta.role is None
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Hello wörld"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == len(engine.requests[0].prompt_token_ids) + len(engine.answer)
    rest = MAX_CONTEXT - len(engine.requests[0].prompt_token_ids)
    assert engine.requests[0].params.max_tokens == rest


async def test_request_ids(http: httpx.AsyncClient, core: GatewayCore, engine: FakeEngine) -> None:
    body = {"prompt": "Hi", "max_tokens": 2}
    answer = await http.post("/v1/completions", json=body, headers={"X-Request-Id": "mine"})
    assert answer.json()["id"] == engine.requests[0].request_id == "cmpl-mine"
    answer = await http.post("/v1/completions", json={**body, "request_id": "own"})
    assert answer.json()["id"] == engine.requests[1].request_id == "own"
    engine.delay = 0.01
    body |= {"max_tokens": 50, "ignore_eos": True}
    task = asyncio.create_task(http.post("/v1/completions", json=body, headers={"X-Request-Id": "it"}))
    while "cmpl-it" not in engine.running:
        await asyncio.sleep(0.01)
    assert await core.abort(["it", "unknown"]) == 1
    assert (await task).json()["choices"][0]["finish_reason"] == "abort"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["Hi", ["Hi", "Ho"]])
async def test_a_client_that_goes_away_aborts(
    http: httpx.AsyncClient, engine: FakeEngine, stream: bool, prompt: str | list[str]
) -> None:
    engine.delay = 0.02
    body = {"prompt": prompt, "max_tokens": 50, "ignore_eos": True, "stream": stream}
    if stream:
        async with http.stream("POST", "/v1/completions", json=body) as response:
            await anext(response.aiter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            await http.post("/v1/completions", json=body, timeout=0.1)
    async with asyncio.timeout(1):
        while engine.running:
            await asyncio.sleep(0.01)
    assert sorted(engine.closed_early) == sorted(request.request_id for request in engine.requests)


LOST = RequestError(ErrorCode.UNAVAILABLE, "attention-0 died", retryable=True)


@pytest.mark.parametrize(
    ("failure", "status", "message"),
    [(LOST, 503, "attention-0 died"), (RuntimeError("secret"), 500, "the request failed inside the server")],
)
async def test_failure_after_acceptance(
    http: httpx.AsyncClient, engine: FakeEngine, failure: RequestError | Exception, status: int, message: str
) -> None:
    engine.failure, engine.fail_after = failure, 2
    whole = await http.post("/v1/completions", json={"prompt": "Hi"})
    assert whole.status_code == status
    assert whole.json()["error"]["message"] == message
    assert whole.headers["retry-after"] == "1"
    chunks = await events(http, "/v1/completions", {"prompt": "Hi"})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == "Hello"
    assert chunks[-1]["error"]["message"] == message
    engine.fail_after = 0
    at_once = await http.post("/v1/completions", json={"prompt": "Hi", "stream": True})
    assert (at_once.status_code, at_once.json()["error"]["message"]) == (status, message)


async def test_failure_of_a_stream_through_the_client(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.failure, engine.fail_after = LOST, 2
    stream = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Hi"}], stream=True
    )
    with pytest.raises(openai.APIError, match="attention-0 died"):
        async for _ in stream:
            pass


@pytest.mark.parametrize("stream", [False, True])
async def test_not_admitted(client: openai.AsyncOpenAI, engine: FakeEngine, stream: bool) -> None:
    engine.rejection = RequestRejected("the queue is full", code=ErrorCode.RESOURCE_EXHAUSTED)
    with pytest.raises(openai.RateLimitError, match="the queue is full") as caught:
        await client.completions.create(model=MODEL, prompt="Hi", stream=stream)
    assert caught.value.response.headers["retry-after"] == "1"


async def test_without_a_tokenizer(bare_http: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = {"prompt": [1, 2], "max_tokens": 3, "logprobs": 0, "echo": True}
    choice = (await bare_http.post("/v1/completions", json=body)).json()["choices"][0]
    assert choice["text"] == ""
    assert choice["token_ids"] == list(engine.answer[:3])
    assert choice["prompt_token_ids"] == [1, 2]
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in (1, 2, *engine.answer[:3])]
    chunks = await events(bare_http, "/v1/completions", {"prompt": [1, 2]})
    assert [token_id for chunk in chunks for token_id in chunk["choices"][0]["token_ids"]] == list(engine.answer)
    for path, bad, field in [
        ("completions", {"prompt": "Hi"}, "prompt"),
        ("completions", {"prompt": [1], "stop": "a"}, "stop"),
        ("chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}, "messages"),
    ]:
        error = (await bare_http.post(f"/v1/{path}", json=bad)).json()["error"]
        assert error["param"] == field
        assert error["message"].startswith(field)
        assert "no tokenizer" in error["message"]
