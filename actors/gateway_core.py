"""Prompts in, text out: what the HTTP and the gRPC interface have in common.

Knows neither ray nor the two protocols.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from actors.client import EngineClient
from actors.model_info import ModelInfo
from actors.status import ClusterStatus
from actors.validation import SamplingOptions, make_request
from engine.detokenizer import TextStream
from engine.request import (
    ErrorCode,
    FinishReason,
    Request,
    RequestError,
    RequestOutput,
    RequestRejected,
    TokenLogprob,
)
from engine.tokenizer import Tokenizer

log = logging.getLogger("herder")

# Above this many characters, tokenising would hold up the other requests' streams: it is done in a thread.
_LONG_TEXT = 4096


@dataclass(frozen=True)
class Job:
    """A prompt that passed validation: the engine's request, and whether its text leaves special tokens out."""

    request: Request
    skip_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer, or a whole one (`join`). The last piece has a finish reason.

    `text` lags behind `token_ids` while a character is incomplete or a stop string possible. `logprobs` (if asked for)
    and `offsets`, the number of the answer's characters before it, are per token. `prompt_logprobs` come once, with the
    piece that ends the prefill.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    offsets: tuple[int, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    finish_reason: FinishReason | None = None
    error: RequestError | None = None


def join(deltas: Sequence[Delta]) -> Delta:
    """All pieces of an answer as one."""
    return Delta(
        text="".join(d.text for d in deltas),
        token_ids=tuple(t for d in deltas for t in d.token_ids),
        logprobs=tuple(p for d in deltas for p in d.logprobs),
        offsets=tuple(o for d in deltas for o in d.offsets),
        prompt_logprobs=tuple(p for d in deltas for p in d.prompt_logprobs),
        finish_reason=deltas[-1].finish_reason,
        error=deltas[-1].error,
    )


class GatewayCore:
    """One served model behind both interfaces. `tokenizer` None serves token ids only."""

    def __init__(
        self, engine: EngineClient, tokenizer: Tokenizer | None, model: ModelInfo, version: str = "unknown"
    ) -> None:
        if not model.eos_token_ids and tokenizer is not None:
            model = replace(model, eos_token_ids=tokenizer.eos_token_ids)
        self.engine = engine
        self.tokenizer = tokenizer
        self.model = model
        self.version = version

    async def encode(self, text: str, add_special_tokens: bool = True, field: str = "prompt") -> list[int]:
        """Token ids of a text. Raises RequestRejected without a tokenizer."""
        if self.tokenizer is None:
            raise RequestRejected(f"{field} must be token ids: this model has no tokenizer", field=field)
        if len(text) > _LONG_TEXT:
            return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)
        return self.tokenizer.encode(text, add_special_tokens)

    async def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation. Raises RequestRejected without a tokenizer or a chat template."""
        if self.tokenizer is None:
            raise RequestRejected(
                "messages cannot be used: this model has no tokenizer; send a prompt of token ids", field="messages"
            )
        if not messages:
            raise RequestRejected("messages must not be empty", field="messages")
        if sum(len(message["content"]) for message in messages) > _LONG_TEXT:
            return await asyncio.to_thread(self.tokenizer.encode_chat, messages)
        return self.tokenizer.encode_chat(messages)

    def accept(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        options: SamplingOptions,
        default_max_tokens: int | None = None,
    ) -> Job:
        """Validate. Raises RequestRejected, naming the field."""
        if options.stop and self.tokenizer is None:
            raise RequestRejected("stop cannot be used: this model has no tokenizer; use stop_token_ids", field="stop")
        request = make_request(self.model, request_id, prompt_token_ids, options, default_max_tokens)
        return Job(request, options.skip_special_tokens)

    async def generate(self, job: Job) -> AsyncGenerator[Delta, None]:
        """The answer, piece by piece. Closing the generator aborts the request.

        Raises RequestRejected, before the first piece, when the engine does not admit the request. Any other failure is
        a last piece with FinishReason.ERROR.
        """
        request = job.request
        stream = self._text_stream(job.skip_special_tokens, request.params.stop, request.params.min_tokens)
        started = time.monotonic()
        generated = 0
        reason: str = FinishReason.ABORT
        try:
            async with aclosing(self.engine.generate(request)) as outputs:
                async for output in outputs:
                    delta = _delta(stream, output)
                    generated += len(delta.token_ids)
                    reason = delta.finish_reason or reason
                    yield delta
                    if delta.finish_reason is not None:
                        return
            raise RuntimeError("the engine's stream ended without a finish reason")
        except RequestRejected as error:
            reason = error.code
            raise
        except Exception:
            log.exception("request failed request_id=%s", request.request_id)
            reason = FinishReason.ERROR
            failure = RequestError(ErrorCode.INTERNAL, "the request failed inside the server", retryable=True)
            yield Delta(text=stream.finish(), finish_reason=FinishReason.ERROR, error=failure)
        finally:
            log.info(
                "request ended request_id=%s reason=%s prompt_tokens=%d completion_tokens=%d seconds=%.3f",
                request.request_id,
                reason,
                len(request.prompt_token_ids),
                generated,
                time.monotonic() - started,
            )

    async def complete(self, job: Job) -> Delta:
        """The whole answer. Raises RequestRejected as `generate` does."""
        async with aclosing(self.generate(job)) as deltas:
            return join([delta async for delta in deltas])

    async def status(self) -> ClusterStatus:
        """The server's state. Raises RequestRejected (UNAVAILABLE) when it cannot be had."""
        try:
            return await self.engine.status()
        except Exception as error:
            log.exception("no status")
            raise RequestRejected("the controller does not answer", code=ErrorCode.UNAVAILABLE) from error

    async def abort(self, request_ids: Iterable[str]) -> int:
        """End requests by their ids, as answered or as sent in X-Request-Id; returns how many of them there were."""
        return await self.engine.abort([prefix + i for i in request_ids for prefix in ("", "cmpl-", "chatcmpl-")])

    def token_text(self, token_id: int, as_id: bool = False) -> str:
        """A token, to show: `token_id:N` if asked so, or without a tokenizer."""
        return f"token_id:{token_id}" if as_id or self.tokenizer is None else self.tokenizer.token_text(token_id)

    def prompt_text(self, job: Job) -> tuple[str, tuple[int, ...]]:
        """The prompt as text, and for each of its tokens the number of characters before it."""
        stream = self._text_stream(job.skip_special_tokens)
        text, offsets = [], []
        for token_id in job.request.prompt_token_ids:
            offsets.append(stream.decoded)
            text.append(stream.push(token_id))
        return "".join([*text, stream.finish()]), tuple(offsets)

    def _text_stream(self, skip_special_tokens: bool, stops: Sequence[str] = (), min_tokens: int = 0) -> TextStream:
        if self.tokenizer is None:
            return TextStream(lambda _: b"")
        skipped = self.tokenizer.special_ids if skip_special_tokens else ()
        return TextStream(self.tokenizer.token_bytes, skipped, stops, min_tokens)


def _delta(stream: TextStream, output: RequestOutput) -> Delta:
    """What an engine's output adds to the answer. Tokens after the one that completes a stop string are left out."""
    text: list[str] = []
    offsets: list[int] = []
    stop_token_at = None
    if output.finish_reason is FinishReason.STOP and output.stop_token_id is not None:
        stop_token_at = len(output.token_ids) - 1
    for index, token_id in enumerate(output.token_ids):
        offsets.append(stream.decoded)
        if index == stop_token_at:
            stream.skip()
        else:
            text.append(stream.push(token_id))
        if stream.stopped is not None:
            break
    reason = output.finish_reason
    if reason is not None:
        text.append(stream.finish())
    if stream.stopped is not None:
        reason = FinishReason.STOP
    return Delta(
        text="".join(text),
        token_ids=output.token_ids[: len(offsets)],
        logprobs=output.logprobs[: len(offsets)],
        offsets=tuple(offsets),
        prompt_logprobs=output.prompt_logprobs,
        finish_reason=reason,
        error=output.error if reason is FinishReason.ERROR else None,
    )
