"""Answers in OpenAI's form: objects, chunks of a stream, log-probabilities, errors."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from actors.gateway_core import Delta, GatewayCore, Job
from actors.http_schema import ChatBody, CompletionBody
from actors.validation import ContextExceeded
from engine.request import ErrorCode, RequestError, RequestRejected, TokenLogprob

Json: TypeAlias = "str | int | float | bool | Mapping[str, Json] | Sequence[Json] | None"
JsonObject: TypeAlias = dict[str, Json]

# The status and OpenAI's error type for each code.
STATUS: Mapping[ErrorCode, tuple[int, str]] = {
    ErrorCode.INVALID_ARGUMENT: (400, "invalid_request_error"),
    ErrorCode.NOT_FOUND: (404, "invalid_request_error"),
    ErrorCode.ALREADY_EXISTS: (409, "invalid_request_error"),
    ErrorCode.RESOURCE_EXHAUSTED: (429, "rate_limit_error"),
    ErrorCode.UNAVAILABLE: (503, "server_error"),
    ErrorCode.DEADLINE_EXCEEDED: (504, "server_error"),
    ErrorCode.INTERNAL: (500, "server_error"),
}
# JSON has no infinity.
_LEAST_LOGPROB = -9999.0


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> JsonObject:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_of(error: RequestRejected | RequestError) -> tuple[int, JsonObject]:
    """HTTP status and body for a request that was rejected or failed."""
    status, kind = STATUS[error.code]
    if isinstance(error, RequestError):
        return status, error_body(error.message, kind, code=error.code.lower())
    if isinstance(error, ContextExceeded):
        code = "context_length_exceeded"
    elif error.field == "model" and error.code is ErrorCode.NOT_FOUND:
        code = "model_not_found"
    else:
        code = error.code.lower() if error.code is not ErrorCode.INVALID_ARGUMENT else "invalid_value"
    return status, error_body(str(error), kind, error.field, code)


def is_retryable(error: RequestRejected | RequestError) -> bool:
    if isinstance(error, RequestError):
        return error.retryable
    return error.code in (ErrorCode.RESOURCE_EXHAUSTED, ErrorCode.UNAVAILABLE)


def sse(event: JsonObject) -> str:
    """One event of a stream."""
    return f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"


def usage(jobs: Sequence[Job], completion_tokens: int) -> JsonObject:
    prompt_tokens = sum(len(job.request.prompt_token_ids) for job in jobs)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


@dataclass(frozen=True)
class Envelope:
    """The fields that all chunks of an answer share. `created` is seconds since the Unix epoch."""

    id: str
    kind: str
    model: str
    created: int

    @classmethod
    def new(cls, id: str, kind: str, model: str) -> Envelope:
        return cls(id, kind, model, int(time.time()))

    def wrap(self, choices: Sequence[JsonObject], **more: Json) -> JsonObject:
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }


class CompletionChoice:
    """One prompt's answer, as choices of /v1/completions: `choice` makes one of each piece, or one of the whole."""

    def __init__(self, core: GatewayCore, body: CompletionBody, index: int, job: Job) -> None:
        self._core = core
        self._body = body
        self._index = index
        self._job = job
        self._first = True
        self._prompt_text, self._prompt_offsets = core.prompt_text(job) if body.echo else ("", ())

    def choice(self, delta: Delta) -> JsonObject:
        first, self._first = self._first, False
        choice: JsonObject = {
            "index": self._index,
            "text": (self._prompt_text if first else "") + delta.text,
            "logprobs": self._logprobs(delta, first) if self._body.logprobs is not None else None,
            "finish_reason": delta.finish_reason,
        }
        if self._body.return_token_ids or self._core.tokenizer is None:
            choice["token_ids"] = delta.token_ids
            if first:
                choice["prompt_token_ids"] = self._job.request.prompt_token_ids
        return choice

    def _logprobs(self, delta: Delta, first: bool) -> JsonObject:
        token_ids: tuple[int, ...] = delta.token_ids
        logprobs: tuple[TokenLogprob | None, ...] = delta.logprobs
        offsets = tuple(len(self._prompt_text) + offset for offset in delta.offsets)
        if first and self._body.echo:
            token_ids = self._job.request.prompt_token_ids + token_ids
            logprobs = delta.prompt_logprobs + logprobs
            offsets = self._prompt_offsets + offsets
        return {
            "tokens": [self._text(token_id) for token_id in token_ids],
            "token_logprobs": [None if entry is None else _finite(entry.logprob) for entry in logprobs],
            "top_logprobs": [None if entry is None else self._top(entry) for entry in logprobs],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprob) -> JsonObject:
        # The token itself is always among them, as with OpenAI, so there may be one more than asked for.
        found = {self._text(token_id): _finite(logprob) for token_id, logprob in entry.top}
        return {**found, self._text(entry.token_id): _finite(entry.logprob)}

    def _text(self, token_id: int) -> str:
        return self._core.token_text(token_id, self._body.return_tokens_as_token_ids)


class ChatChoice:
    """The answer to a conversation, as the choice of /v1/chat/completions."""

    def __init__(self, core: GatewayCore, body: ChatBody, job: Job) -> None:
        self._core = core
        self._body = body
        self._job = job
        self._first = True

    def chunk(self, delta: Delta) -> JsonObject:
        """The choice for one piece."""
        role: JsonObject = {"role": "assistant"} if self._first else {}
        return self._choice("delta", {**role, "content": delta.text}, delta)

    def choice(self, delta: Delta) -> JsonObject:
        """The choice for the whole answer."""
        return self._choice("message", {"role": "assistant", "content": delta.text, "refusal": None}, delta)

    def _choice(self, key: str, message: JsonObject, delta: Delta) -> JsonObject:
        first, self._first = self._first, False
        choice: JsonObject = {
            "index": 0,
            key: message,
            "logprobs": self._logprobs(delta) if self._body.logprobs else None,
            "finish_reason": delta.finish_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = delta.token_ids
            if first:
                choice["prompt_token_ids"] = self._job.request.prompt_token_ids
        return choice

    def _logprobs(self, delta: Delta) -> JsonObject:
        return {
            "content": [
                {
                    **self._token(entry.token_id, entry.logprob),
                    "top_logprobs": [self._token(token_id, logprob) for token_id, logprob in entry.top],
                }
                for entry in delta.logprobs
            ],
            "refusal": None,
        }

    def _token(self, token_id: int, logprob: float) -> JsonObject:
        assert self._core.tokenizer is not None  # without one there is no chat
        return {
            "token": self._core.token_text(token_id, self._body.return_tokens_as_token_ids),
            "logprob": _finite(logprob),
            "bytes": list(self._core.tokenizer.token_bytes(token_id)),
        }


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
