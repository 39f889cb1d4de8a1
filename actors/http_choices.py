"""Choices in OpenAI's form: of a whole answer, or of the chunks of a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from actors.answers import Delta, Job
from actors.gateway_core import GatewayCore
from actors.http_answers import Json, JsonObject
from actors.http_chat_schema import ChatBody
from actors.http_schema import Body, CompletionBody
from actors.tool_use import CallEvent, join_calls
from engine.request import TokenLogprob
from engine.tools import CallStart

# JSON has no infinity.
_LEAST_LOGPROB = -9999.0


class CompletionChoice:
    """One answer to a prompt, as choices of /v1/completions: `choice` makes one of each piece, or one of the whole."""

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
        if delta.prompt_logprobs and self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(self._core, self._body, self._job, delta)
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
    """One answer to a conversation, as a choice of /v1/chat/completions."""

    def __init__(self, core: GatewayCore, body: ChatBody, index: int, job: Job) -> None:
        self._core = core
        self._body = body
        self._index = index
        self._job = job
        self._first = True

    def chunk(self, delta: Delta) -> JsonObject:
        """The choice for one piece."""
        message: JsonObject = {"role": "assistant"} if self._first else {}
        message["content"] = delta.text
        if delta.calls:
            message["tool_calls"] = _call_deltas(delta.calls)
        return self._choice("delta", message, delta)

    def choice(self, delta: Delta) -> JsonObject:
        """The choice for the whole answer."""
        message: JsonObject = {"role": "assistant", "content": delta.text, "refusal": None}
        if delta.calls:
            message["content"] = delta.text or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in join_calls(delta.calls)
            ]
        return self._choice("message", message, delta)

    def _choice(self, key: str, message: JsonObject, delta: Delta) -> JsonObject:
        first, self._first = self._first, False
        choice: JsonObject = {
            "index": self._index,
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


def prompt_logprobs(core: GatewayCore, body: Body, job: Job, delta: Delta) -> Json:
    """vLLM's form: for each token of the prompt none, or logprob, rank and text by token id, its own first."""
    found: list[Json] = []
    for token_id, entry in zip(job.request.prompt_token_ids, delta.prompt_logprobs, strict=True):
        if entry is None:
            found.append(None)
            continue
        ranks = {other: rank for rank, (other, _) in enumerate(entry.top, start=1)}
        logprobs = {token_id: entry.logprob, **dict(entry.top)}
        found.append(
            {
                str(other): {
                    "logprob": _finite(logprob),
                    "rank": ranks.get(other),  # unknown for a token that is not among the most likely ones
                    "decoded_token": core.token_text(other, body.return_tokens_as_token_ids),
                }
                for other, logprob in logprobs.items()
            }
        )
    return found


def _call_deltas(events: Sequence[CallEvent]) -> list[JsonObject]:
    """Pieces of calls, one entry for each call."""
    found: dict[int, JsonObject] = {}
    arguments: dict[int, str] = {}
    for event in events:
        entry = found.setdefault(event.index, {"index": event.index})
        if isinstance(event, CallStart):
            entry |= {"id": event.id, "type": "function"}
            entry["function"] = {"name": event.name, "arguments": ""}
        else:
            arguments[event.index] = arguments.get(event.index, "") + event.text
            named = entry.get("function")
            entry["function"] = {**(named if isinstance(named, Mapping) else {}), "arguments": arguments[event.index]}
    return list(found.values())


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
