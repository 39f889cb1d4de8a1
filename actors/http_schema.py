"""Bodies of HTTP requests in OpenAI's form, with the extras that serving users know."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

from actors.validation import SamplingOptions, template_role
from engine.request import RequestRejected

# Known fields that change nothing here, whatever they say.
_IGNORED = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)
# Known fields that are not supported, each with the values that ask for nothing.
_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "prompt_logprobs": (),
    "cache_salt": ("",),
    "priority": (0,),
    "use_beam_search": (False,),
    "chat_template": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "include_stop_str_in_output": (False,),
}


def _parse_prompt(value: object) -> list[str | list[int]]:
    """One or more prompts, all of one kind. Raises RequestRejected."""
    found: list[Any] = value if isinstance(value, list) and not (value and _is_int(value[0])) else [value]
    if not found or any(item in ("", []) for item in found if not isinstance(item, str)):
        raise RequestRejected("prompt must not be empty", field="prompt")
    if all(isinstance(item, str) for item in found):
        return found
    if all(isinstance(item, list) and all(map(_is_int, item)) for item in found):
        return found
    raise RequestRejected(
        "prompt must be a string, a list of strings, a list of token ids or a list of lists of token ids",
        field="prompt",
    )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class _Strict(BaseModel):
    # Unknown fields are refused by _Body, which knows what to say about them; parts of messages may carry any.
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class StreamOptions(_Strict):
    include_usage: bool = False


class _Body(_Strict):
    """What completions and chat completions have in common. A null field is the same as none."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    min_tokens: int | None = Field(None, ge=0)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    ignore_eos: bool = False
    stop: str | list[str] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list)
    skip_special_tokens: bool = True
    return_tokens_as_token_ids: bool = False
    return_token_ids: bool = False
    request_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, data: object) -> object:
        if not isinstance(data, dict):
            raise RequestRejected("the body must be a JSON object")
        data = {name: value for name, value in data.items() if value is not None}
        for name, value in data.items():
            if name in cls.model_fields or name in _IGNORED:
                continue
            if name not in _UNSUPPORTED:
                name = name[:64]
                near = difflib.get_close_matches(name, [*cls.model_fields, *_UNSUPPORTED, *_IGNORED], n=1, cutoff=0)
                raise RequestRejected(f"{name} is not a known field; the nearest is {near[0]}", field=name)
            if value not in _UNSUPPORTED[name]:
                raise RequestRejected(f"{name} is not supported here", field=name)
        return data

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise RequestRejected("stream_options is only allowed when stream is true", field="stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def _sampling(self, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None) -> SamplingOptions:
        return SamplingOptions(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            ignore_eos=self.ignore_eos,
            stop=[self.stop] if isinstance(self.stop, str) else self.stop,
            stop_token_ids=self.stop_token_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            skip_special_tokens=self.skip_special_tokens,
        )


class CompletionBody(_Body):
    """POST /v1/completions."""

    prompt: Annotated[
        list[str | list[int]],
        PlainValidator(_parse_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    max_tokens: int | None = None
    echo: bool = False
    logprobs: int | None = None

    def sampling(self) -> SamplingOptions:
        return self._sampling(self.max_tokens, self.logprobs, self.logprobs if self.echo else None)


class Message(_Strict):
    """One turn. Parts of its content become one text."""

    role: str
    content: str

    @model_validator(mode="before")
    @classmethod
    def _join_parts(cls, data: object) -> object:
        if not isinstance(data, dict):
            raise RequestRejected("messages must be made of objects with role and content", field="messages")
        for name in ("tool_calls", "function_call", "tool_call_id", "audio"):
            if data.get(name):
                raise RequestRejected(f"messages: {name} is not supported here", field="messages")
        if isinstance(role := data.get("role"), str):
            template_role(role)
        content = data.get("content")
        if not isinstance(content, list):
            return data
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text":
                kind = str(part.get("type"))[:64] if isinstance(part, dict) else type(part).__name__
                raise RequestRejected(f"messages: content of type {kind!r} is not supported here", field="messages")
            if not isinstance(part.get("text"), str):
                raise RequestRejected("messages: a content part of type 'text' must have a text", field="messages")
        return {**data, "content": "".join(part["text"] for part in content)}

    def for_template(self) -> dict[str, str]:
        return {"role": template_role(self.role), "content": self.content}


class ChatBody(_Body):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestRejected("top_logprobs needs logprobs to be true", field="top_logprobs")
        return self

    def sampling(self) -> SamplingOptions:
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self._sampling(max_tokens, (self.top_logprobs or 0) if self.logprobs else None, None)
