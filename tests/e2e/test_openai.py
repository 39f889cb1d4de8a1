"""Every feature of the OpenAI-compatible interface, through the official client, against the live tiny deployment."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from actors.deployment import Deployment

pytestmark = pytest.mark.cluster

MODEL = "tiny"
ASK = [{"role": "user", "content": "17+25="}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "minimum": 0, "maximum": 99},
                    "op": {"enum": ["plus", "minus"]},
                },
                "required": ["a", "op"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 999}, "word": {"enum": ["yes", "no"]}},
    "required": ["n", "word"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(tiny: Deployment) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{tiny.http_url}/v1", api_key="none", max_retries=0, timeout=60) as found:
        yield found


@pytest.fixture(scope="module")
def http(tiny: Deployment) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=tiny.http_url, timeout=60) as found:
        yield found


@pytest.fixture(scope="module", autouse=True)
def no_actor_is_lost(http: httpx.Client) -> Iterator[None]:
    """Nobody would notice: requests go on elsewhere."""
    before = http.get("/load").json()["failovers"]
    yield
    assert http.get("/load").json()["failovers"] == before


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_chat(client):
    answer = client.chat.completions.create(model=MODEL, messages=ASK, temperature=0)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("42", "stop")
    assert answer.usage.completion_tokens == 3
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 3


def test_chat_stream_with_usage(client):
    stream = client.chat.completions.create(
        model=MODEL, messages=ASK, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "42"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 3)


def test_completion_and_its_stream(client):
    wanted = {"model": MODEL, "prompt": "17+25=", "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(**wanted).choices[0]
    stream = list(client.completions.create(**wanted, stream=True))
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.text
    assert stream[-1].choices[0].finish_reason == whole.finish_reason


def test_stop_strings_end_the_answer(client):
    wanted = {"model": MODEL, "messages": ASK, "temperature": 0}
    choice = client.chat.completions.create(**wanted, stop=["2"]).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("4", "stop")
    streamed = client.chat.completions.create(**wanted, stop=["2"], stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == "4"


def test_stop_token_ids_and_min_tokens(client):
    four = ord("4")
    wanted = {"model": MODEL, "messages": ASK, "temperature": 0}
    token = (
        client.chat.completions.create(**wanted, max_tokens=1, extra_body={"return_token_ids": True})
        .choices[0]
        .model_extra["token_ids"][0]
    )
    early = client.chat.completions.create(**wanted, extra_body={"stop_token_ids": [token]})
    assert (early.usage.completion_tokens, early.choices[0].message.content) == (1, "")
    late = client.chat.completions.create(**wanted, extra_body={"min_tokens": 10}, max_tokens=20)
    assert late.usage.completion_tokens >= 10
    assert chr(four) in late.choices[0].message.content


def test_logprobs(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK, temperature=0, logprobs=True, top_logprobs=3
    ).choices[0]
    entries = answer.logprobs.content
    assert "".join(entry.token for entry in entries[:2]) == "42"
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)  # greedy
        assert entry.logprob <= 0


def test_prompt_logprobs(client):
    answer = client.completions.create(
        model=MODEL, prompt=[5, 6, 7, 8], max_tokens=1, extra_body={"prompt_logprobs": 1}
    )
    found = answer.choices[0].model_extra["prompt_logprobs"]
    assert found[0] is None and len(found) == 4
    assert all(found[n][str(token)]["logprob"] < 0 for n, token in enumerate([6, 7, 8], start=1))


def test_n_and_seed(client):
    wanted = {
        "model": MODEL,
        "prompt": [5, 6, 7],
        "temperature": 1.0,
        "max_tokens": 16,
        "extra_body": {"ignore_eos": True},
    }
    several = client.completions.create(**wanted, n=3, seed=7)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    texts = [choice.text for choice in several.choices]
    assert len(set(texts)) > 1
    # Answer i draws with seed + i, whatever else runs.
    assert texts == [client.completions.create(**wanted, seed=7 + i).choices[0].text for i in range(3)]
    assert (several.usage.prompt_tokens, several.usage.completion_tokens) == (3, 48)
    streamed = ["", "", ""]
    for chunk in client.completions.create(**wanted, n=3, seed=7, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_penalties_and_logit_bias(client):
    wanted = {"model": MODEL, "prompt": [5, 6, 7], "temperature": 0, "max_tokens": 24}
    tokens = {"ignore_eos": True, "return_token_ids": True}

    def ask(extra: dict[str, object] | None = None, **more: object) -> list[int]:
        answer = client.completions.create(**wanted, **more, extra_body={**tokens, **(extra or {})})
        return answer.choices[0].model_extra["token_ids"]

    assert ask(logit_bias={"65": 100}) == [65] * 24
    plain = ask()
    assert plain[0] not in ask(logit_bias={str(plain[0]): -100})
    for changed in (ask(frequency_penalty=2), ask(presence_penalty=2), ask({"repetition_penalty": 2.0})):
        assert len(set(changed)) >= len(set(plain))
    assert len(set(ask(frequency_penalty=2, logit_bias={"65": 5}))) > 1


def test_prefix_cache_shows_in_usage(client):
    prompt = [n % 250 for n in range(600)]
    first, second = (
        client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=1, temperature=0, extra_body={"cache_salt": "a"}
        )
        for _ in range(2)
    )
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    # There are two attention actors: the second request may have met the other one's cache.
    third = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=1, temperature=0, extra_body={"cache_salt": "a"}
    )
    cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in (second, third)]
    assert max(cached) > 0
    assert len({answer.choices[0].text for answer in (first, second, third)}) == 1
    other = client.completions.create(model=MODEL, prompt=prompt, max_tokens=1, extra_body={"cache_salt": "b"})
    assert other.usage.prompt_tokens_details.cached_tokens == 0


# ---- structured output


def test_json_schema(client):
    form = {"type": "json_schema", "json_schema": {"name": "pair", "schema": SCHEMA, "strict": True}}
    for temperature in (0, 1):
        choice = client.chat.completions.create(
            model=MODEL, messages=ASK, temperature=temperature, response_format=form, max_tokens=400
        ).choices[0]
        assert choice.finish_reason == "stop", choice.message.content
        found = json.loads(choice.message.content)
        assert set(found) == {"n", "word"} and 0 <= found["n"] <= 999 and found["word"] in ("yes", "no")


def test_json_object(client):
    choice = client.chat.completions.create(
        model=MODEL, messages=ASK, temperature=0, response_format={"type": "json_object"}, max_tokens=200
    ).choices[0]
    assert choice.message.content.lstrip().startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


@pytest.mark.parametrize(
    ("form", "right"),
    [
        ({"choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"regex": "[ab]{3}-[0-9]{2}"}, lambda text: len(text) == 6 and text[3] == "-" and text[4:].isdigit()),
        ({"json": {"type": "integer", "minimum": 10, "maximum": 99}}, lambda text: 10 <= int(text) <= 99),
        (
            {"grammar": 'start: "a" "b"+ "c"'},
            lambda text: text[0] == "a" and text[-1] == "c" and set(text[1:-1]) == {"b"},
        ),
    ],
)
def test_structured_outputs(client, form, right):
    for stream in (False, True):
        wanted = {"model": MODEL, "messages": ASK, "temperature": 1, "seed": 3, "max_tokens": 100}
        if stream:
            chunks = list(
                client.chat.completions.create(**wanted, stream=True, extra_body={"structured_outputs": form})
            )
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            choice = client.chat.completions.create(**wanted, extra_body={"structured_outputs": form}).choices[0]
            text, reason = choice.message.content, choice.finish_reason
        assert reason == "length" or right(text), text


def test_a_schema_that_is_none_is_refused(client):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=ASK, response_format=form)
    assert caught.value.param == "response_format"


# ---- tools


def check_call(function: object, name: str | None = None) -> None:
    arguments = json.loads(function.arguments)
    assert function.name in ({name} if name else {"add", "now"})
    if function.name == "add":
        assert (
            set(arguments) == {"a", "op"} and isinstance(arguments["a"], int) and arguments["op"] in ("plus", "minus")
        )


FORCED = [("required", None), ({"type": "function", "function": {"name": "add"}}, "add")]


@pytest.mark.parametrize(("choice", "name"), FORCED)
def test_forced_tool_calls(client, choice, name):
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, temperature=0,
        max_tokens=200,
    ).choices[0]  # fmt: skip
    (call,) = answer.message.tool_calls
    check_call(call.function, name)
    assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)


@pytest.mark.parametrize(("choice", "name"), FORCED)
def test_streamed_tool_calls(client, choice, name):
    with client.chat.completions.stream(
        model=MODEL, messages=ASK, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, temperature=0,
        max_tokens=200,
    ) as stream:  # fmt: skip
        answer = stream.get_final_completion().choices[0]
    (call,) = answer.message.tool_calls
    check_call(call.function, name)
    assert answer.finish_reason == "tool_calls"


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_tools_that_are_not_called(client, choice):
    """The tiny model calls nothing by itself: its answer comes as content, as without tools."""
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK, tools=TOOLS, tool_choice=choice, temperature=0, max_tokens=20
    ).choices[0]
    assert not answer.message.tool_calls and answer.message.content is not None
    if choice == "none":
        assert answer.message.content == "42"


def test_a_conversation_with_a_tool_result(client):
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "op": "plus"}'}}
    messages = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
    ]
    answer = client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS, max_tokens=5)
    assert answer.usage.completion_tokens > 0


# ---- around it


def test_errors(client, tiny):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="other", messages=ASK)
    for change, param in (({"temperature": -1}, "temperature"), ({"n": 17}, "n"), ({"max_tokens": -1}, "max_tokens")):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=MODEL, messages=ASK, **change)
        assert caught.value.param == param
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=[1] * 5000)
    assert caught.value.code == "context_length_exceeded"
    assert httpx.get(f"{tiny.http_url}/v1/nothing").json()["error"]["type"] == "invalid_request_error"


def test_a_deadline_that_passes(client):
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(
            model=MODEL, prompt=[1], max_tokens=4000, extra_body={"ignore_eos": True, "timeout": 0.05}
        )
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")


def test_tokenize_and_back(http):
    found = http.post("/tokenize", json={"model": MODEL, "prompt": "17+25=", "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    back = http.post("/detokenize", json={"model": MODEL, "tokens": found["tokens"]}).json()
    assert back["prompt"].endswith("17+25=")
    chat = http.post("/tokenize", json={"messages": ASK, "tools": TOOLS}).json()
    assert chat["count"] > found["count"] and chat["max_model_len"] >= 4096


def test_version_load_and_metrics(http):
    assert http.get("/version").json()["version"]
    deadline = time.monotonic() + 60
    while set((load := http.get("/load").json())["engines"]) != {"attention-0", "attention-1"}:
        assert time.monotonic() < deadline, load  # one that gives no answer in time is left out
    assert load["server_load"] == 0
    families = {family.name for family in text_string_to_metric_families(http.get("/metrics").text)}
    assert {
        "herder_requests",
        "herder_time_to_first_token_seconds",
        "herder_time_per_output_token_seconds",
        "herder_e2e_request_latency_seconds",
        "herder_requests_running",
        "herder_requests_waiting",
        "herder_kv_cache_usage",
    } <= families
