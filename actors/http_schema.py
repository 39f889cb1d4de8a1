"""Bodies of HTTP requests in OpenAI's form, with the extras that serving users know."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, PlainValidator, model_validator

from actors.http_formats import RequestBody, ResponseFormat, Strict, StructuredOutputs
from actors.validation import Options
from engine.request import Grammar, RequestRejected

# Known fields that change nothing here, whatever they say.
_IGNORED = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)
# Known fields that are not supported, each with the values that ask for nothing.
_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "suffix": ("",),
    "length_penalty": (1,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "use_beam_search": (False,),
    "chat_template": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "include_stop_str_in_output": (False,),
}
# Names that others use, or have used, for fields that are here.
_RENAMED: Mapping[str, str] = {
    "guided_json": 'structured_outputs: {"json": ...}',
    "guided_regex": 'structured_outputs: {"regex": ...}',
    "guided_choice": 'structured_outputs: {"choice": ...}',
    "guided_grammar": 'structured_outputs: {"grammar": ...}',
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


def _parse_logit_bias(value: object) -> dict[int, float]:
    """OpenAI's map of token ids, as strings, to numbers. Raises RequestRejected."""
    if not isinstance(value, dict):
        raise RequestRejected("logit_bias must be an object of token ids and numbers", field="logit_bias")
    found: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise RequestRejected(f"logit_bias: {key[:64]!r} is no token id", field="logit_bias")
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise RequestRejected(f"logit_bias of token {int(key)} must be a number", field="logit_bias")
        found[int(key)] = float(bias)
    return found


class StreamOptions(Strict):
    include_usage: bool = False


class Body(RequestBody):
    """What completions and chat completions have in common. A null field is the same as none."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = None
    best_of: int | None = None
    min_tokens: int | None = Field(None, ge=0)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[
        dict[int, float], PlainValidator(_parse_logit_bias, json_schema_input_type=dict[str, float])
    ] = Field(default_factory=dict)
    seed: int | None = None
    ignore_eos: bool = False
    stop: str | list[str] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list)
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    return_tokens_as_token_ids: bool = False
    return_token_ids: bool = False
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: int = Field(0, ge=-(2**31), lt=2**31)
    cache_salt: str = ""
    timeout: float | None = None  # seconds from the request's arrival
    request_id: str | None = None

    @classmethod
    def _prepare(cls, data: object) -> object:
        if not isinstance(data, dict):
            raise RequestRejected("the body must be a JSON object")
        data = {name: value for name, value in data.items() if value is not None}
        for name, value in data.items():
            if name in cls.model_fields or name in _IGNORED:
                continue
            if name in _RENAMED:
                raise RequestRejected(f"{name} is not supported here; use {_RENAMED[name]}", field=name)
            if name not in _UNSUPPORTED:
                name = name[:64]
                near = difflib.get_close_matches(name, [*cls.model_fields, *_UNSUPPORTED, *_IGNORED], n=1, cutoff=0)
                raise RequestRejected(f"{name} is not a known field; the nearest is {near[0]}", field=name)
            if value not in _UNSUPPORTED[name]:
                raise RequestRejected(f"{name} is not supported here", field=name)
        return data

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise RequestRejected("stream_options is only allowed when stream is true", field="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise RequestRejected("prompt_logprobs cannot be used when stream is true", field="prompt_logprobs")
        if self.best_of is not None and self.best_of != (1 if self.n is None else self.n):
            raise RequestRejected("best_of must be equal to n: all answers are given", field="best_of")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def _grammar(self) -> Grammar | None:
        format = None if self.response_format is None else self.response_format.grammar()
        if self.structured_outputs is None:
            return format
        if format is not None:
            raise RequestRejected(
                "structured_outputs cannot be used together with response_format", field="structured_outputs"
            )
        return self.structured_outputs.grammar()

    def _options(
        self, deadline: float | None, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None
    ) -> Options:
        return Options(
            n=self.n,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            seed=self.seed,
            ignore_eos=self.ignore_eos,
            stop=[self.stop] if isinstance(self.stop, str) else self.stop,
            stop_token_ids=self.stop_token_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            skip_special_tokens=self.skip_special_tokens,
            grammar=self._grammar(),
            priority=self.priority,
            cache_salt=self.cache_salt,
            deadline=deadline,
        )


class CompletionBody(Body):
    """POST /v1/completions."""

    prompt: Annotated[
        list[str | list[int]],
        PlainValidator(_parse_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    max_tokens: int | None = None
    echo: bool = False
    logprobs: int | None = None

    def options(self, deadline: float | None) -> Options:
        """`deadline` in Unix seconds. Raises RequestRejected."""
        prompt_logprobs = self.logprobs if self.echo and self.prompt_logprobs is None else self.prompt_logprobs
        return self._options(deadline, self.max_tokens, self.logprobs, prompt_logprobs)
