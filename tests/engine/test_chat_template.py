"""Conversations with tools, calls and results, through the bundled model's chat template and one like Llama 4's own."""

from __future__ import annotations

import pytest

from checkpoints.tiny_tokenizer import build_tokenizer
from engine.request import RequestRejected
from engine.tokenizer import Tokenizer
from engine.tool_parser import parse
from engine.tools import Tool

WEATHER = Tool(
    "get_weather",
    "The weather of a city",
    {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Paris?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}},
            {"id": "2", "type": "function", "function": {"name": "get_weather", "arguments": ""}},
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "sunny"},
]

# Takes from the messages what Llama 4's own template takes, in the same ways: parts of `content` that is no text,
# `arguments` through `tojson`, roles for tools' results.
LLAMA4_LIKE = """\
{{- bos_token }}
{%- if tools %}{{- "<|header_start|>system<|header_end|>\\n\\n" }}
    {%- for t in tools %}{{- t | tojson(indent=4) + "\\n\\n" }}{%- endfor %}{{- "<|eot|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role in ('tool', 'ipython') %}
        {{- "<|header_start|>ipython<|header_end|>\\n\\n" }}
        {%- if message.content is string %}{{- message.content }}{%- else %}{{- message.content | tojson }}{%- endif %}
    {%- else %}
        {{- '<|header_start|>' + message['role'] + '<|header_end|>\\n\\n' }}
        {%- if message['content'] is string %}{{- message['content'] }}
        {%- else %}{%- for part in message['content'] %}{{- part['text'] }}{%- endfor %}
        {%- endif %}
        {%- if 'tool_calls' in message and message.tool_calls | length > 0 %}
            {%- for call in message.tool_calls %}
                {{- '{"name": "' + call.function.name + '", "parameters": ' + call.function.arguments | tojson + '}' }}
            {%- endfor %}
        {%- endif %}
    {%- endif %}
    {{- "<|eot|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header_start|>assistant<|header_end|>\\n\\n' }}{%- endif %}
"""


@pytest.fixture(params=["bundled", "llama4-like"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    fast = build_tokenizer(4096)
    if request.param == "llama4-like":
        fast.chat_template = LLAMA4_LIKE
    return Tokenizer(fast)


def test_a_conversation_with_calls_reaches_the_model(tokenizer: Tokenizer) -> None:
    text = tokenizer.decode(tokenizer.encode_chat(CONVERSATION, [WEATHER.definition()]), skip_special_tokens=False)
    assert '"description": "The weather of a city"' in text
    call, result = '{"name": "get_weather", "parameters": {"city": "Paris"}}', "ipython<|header_end|>\n\nsunny<|eot|>"
    assert 0 < text.index("Paris?") < text.index(call) < text.index(result)
    assert '{"name": "get_weather", "parameters": {}}' in text
    assert text.endswith("<|header_start|>assistant<|header_end|>\n\n")
    said = text[text.index(call) : text.index(result)]
    content, calls = parse(said[: said.rindex("}") + 1], ["get_weather"], str)
    assert (content, [call.arguments for call in calls]) == ("", ['{"city": "Paris"}', "{}"])


def test_parts_of_content_reach_the_model(tokenizer: Tokenizer) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Paris?"}]}]
    assert tokenizer.encode_chat(parts) == tokenizer.encode_chat([{"role": "user", "content": "Paris?"}])


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": r'{"a": "\ud800"}'}}]},
        {"role": "assistant", "tool_calls": [{}]},
        {"role": "user", "content": 5},
    ],
)
def test_messages_that_no_template_can_take_are_rejected(tokenizer: Tokenizer, message: dict[str, object]) -> None:
    with pytest.raises(RequestRejected) as caught:
        tokenizer.encode_chat([message])
    assert caught.value.field == "messages" and str(caught.value).count("messages") == 1
