"""What all answers over HTTP have in common, in OpenAI's form: envelopes, events, usage, errors."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from fastapi.responses import JSONResponse

from actors.answers import UsageCount
from actors.validation import ContextExceeded, is_retryable
from engine.request import ErrorCode, RequestError, RequestRejected

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


class Answer(JSONResponse):
    """JSON, whatever text it holds: half a surrogate pair (in an error's quotation) is written as an escape."""

    def render(self, content: object) -> bytes:
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode(errors="backslashreplace")


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


def sse(event: JsonObject) -> str:
    """One event of a stream."""
    return f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"


def error_response(error: RequestRejected | RequestError) -> Answer:
    status, body = error_of(error)
    return Answer(body, status, {"Retry-After": "1"} if is_retryable(error) else None)


def usage(count: UsageCount) -> JsonObject:
    return {
        "prompt_tokens": count.prompt_tokens,
        "completion_tokens": count.completion_tokens,
        "total_tokens": count.prompt_tokens + count.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": count.cached_tokens},
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
