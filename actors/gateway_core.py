"""Prompts in, text out: what the HTTP and the gRPC interface have in common.

Knows neither ray nor the two protocols.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from actors.answers import CallFinder, Delta, Job, piece_of
from actors.client import EngineClient
from actors.current_span import current_span
from actors.image_prompt import Chat, ImagePrompts, Prompt
from actors.metrics import GatewayMetrics, Recorder
from actors.model_info import ModelInfo
from actors.status import ClusterStatus
from actors.tool_use import ToolUse
from actors.validation import MAX_CHOICES, Options, check_token_ids, make_request
from engine.detokenizer import TextStream
from engine.request import ErrorCode, FinishReason, Request, RequestError, RequestOutput, RequestRejected
from engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from actors.tracing import Tracing

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger("herder")

# Above this many characters, tokenising would hold up the other requests' streams: it is done in a thread.
_LONG_TEXT = 4096


class GatewayCore:
    """One served model behind both interfaces. `tokenizer` None serves token ids only, `images` None no images."""

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer | None,
        model: ModelInfo,
        version: str = "unknown",
        images: ImagePrompts | None = None,
        recorder: Recorder | None = None,
        tracing: Tracing | None = None,
        log_prompts: bool = False,
    ) -> None:
        """`recorder` gets what is measured of requests, beside /metrics; `tracing` makes their spans."""
        if not model.eos_token_ids and tokenizer is not None:
            model = replace(model, eos_token_ids=tokenizer.eos_token_ids)
        self.engine = engine
        self.tokenizer = tokenizer
        self.model = model
        self.version = version
        self.images = images
        self.tracing = tracing
        self.log_prompts = log_prompts
        self.metrics = GatewayMetrics(model.name, elsewhere=recorder)
        if images is not None:
            images.pace.on_turn = self.metrics.image_waited

    async def encode(self, text: str, add_special_tokens: bool = True, field: str = "prompt") -> list[int]:
        """Token ids of a text. Raises RequestRejected without a tokenizer."""
        if self.tokenizer is None:
            raise RequestRejected(f"{field} must be token ids: this model has no tokenizer", field=field)
        return await _tokenise(len(text), self.tokenizer.encode, text, add_special_tokens)

    async def encode_chat(self, chat: Chat, tools: ToolUse | None = None, deadline: float | None = None) -> Prompt:
        """The prompt of a conversation, with its images. `deadline` in Unix seconds.

        Raises RequestRejected without a tokenizer or a chat template, and for images that cannot be used.
        """
        if self.tokenizer is None:
            raise RequestRejected(
                "messages cannot be used: this model has no tokenizer; send a prompt of token ids", field="messages"
            )
        if not chat.messages:
            raise RequestRejected("messages must not be empty", field="messages")
        offered = [] if tools is None else [tool.definition() for tool in tools.offered]
        length = len(json.dumps([*chat.messages, *offered]))
        if self.images is not None:
            place, reserved = self.images.place, self.images.reserved
            split = self.tokenizer.encode_chat_between
            pieces = await _tokenise(length, split, chat.messages, offered, place, reserved)
            return await self.images.fill(pieces, chat.images, deadline)
        if chat.images:
            raise RequestRejected("messages: this model takes no images", field="messages")
        return Prompt(await _tokenise(length, self.tokenizer.encode_chat, chat.messages, offered))

    def decode(self, token_ids: Sequence[int], field: str) -> str:
        """The text of token ids, special tokens included. Raises RequestRejected without a tokenizer."""
        if self.tokenizer is None:
            raise RequestRejected(f"{field} cannot be turned into text: this model has no tokenizer", field=field)
        check_token_ids(self.model, token_ids, field)
        return self.tokenizer.decode(token_ids, skip_special_tokens=False)

    async def accept(
        self,
        answer_id: str,
        prompts: Sequence[Prompt],
        options: Options,
        default_max_tokens: int | None = None,
        tools: ToolUse | None = None,
    ) -> list[Job]:
        """Validates. One job for each prompt and each of its `n` answers, in order.

        If there are several, they are named `answer_id-index`. Raises RequestRejected, naming the field.
        """
        if self.tokenizer is None and options.stop:
            raise RequestRejected("stop cannot be used: this model has no tokenizer; use stop_token_ids", field="stop")
        if self.tokenizer is None and options.grammar is not None:
            raise RequestRejected(
                "response_format cannot be used: this model has no tokenizer", field="response_format"
            )
        tools = tools or ToolUse()
        if tools.forced:  # a grammar of all tools' schemas takes its time
            grammar = await asyncio.to_thread(tools.constrain, options.grammar)
        else:
            grammar = tools.constrain(options.grammar)
        options = replace(options, grammar=grammar)
        count = options.choices
        jobs = []
        for index in range(len(prompts) * count):
            request_id = answer_id if len(prompts) * count == 1 else f"{answer_id}-{index}"
            prompt, choice = prompts[index // count], index % count
            request = make_request(
                self.model, request_id, prompt.token_ids, options, default_max_tokens, choice, prompt.places
            )
            jobs.append(Job(request, prompt.images, choice, options.skip_special_tokens, tools))
        return jobs

    async def generate(self, job: Job) -> AsyncGenerator[Delta, None]:
        """The answer, piece by piece. Closing the generator aborts the request.

        Raises RequestRejected, before the first piece, when the engine does not admit the request. Any other failure is
        a last piece with FinishReason.ERROR.
        """
        request = job.request
        self._log_accepted(job)
        if (span := current_span()) is not None:
            span.ask(request)
            request = replace(request, timed=True)
        stream = self._text_stream(job.skip_special_tokens, request.params.stop, request.params.min_tokens)
        calls = CallFinder(job.tools)
        record = self.metrics.begin(len(request.prompt_token_ids))
        reason: str = FinishReason.ABORT
        try:
            async with aclosing(self._outputs(request, job.images)) as outputs:
                async for output in outputs:
                    delta = calls.take_out(piece_of(stream, output))
                    record.add(len(delta.token_ids), delta.cached_tokens)
                    reason = delta.finish_reason or reason
                    if span is not None and delta.error is not None:
                        span.fail(delta.error.code)
                    yield delta
                    if delta.finish_reason is not None:
                        return
            raise RuntimeError("the engine's stream ended without a finish reason")
        except RequestRejected as error:
            reason = error.code
            if span is not None:
                span.fail(error.code)
            raise
        except Exception:
            log.exception("request failed request_id=%s", request.request_id)
            reason = FinishReason.ERROR
            failure = RequestError(ErrorCode.INTERNAL, "the request failed inside the server", retryable=True)
            if span is not None:
                span.fail(failure.code)
            rest = Delta(text=stream.finish(), finish_reason=FinishReason.ERROR, error=failure)
            yield calls.take_out(rest)
        finally:
            record.end(reason)
            if span is not None:
                span.answer(reason, len(request.prompt_token_ids), record.cached, record.generated)
            log.info(
                "request ended request_id=%s reason=%s prompt_tokens=%d completion_tokens=%d seconds=%.3f",
                request.request_id,
                reason,
                len(request.prompt_token_ids),
                record.generated,
                record.seconds,
            )

    async def _outputs(self, request: Request, images: Sequence[bytes]) -> AsyncGenerator[RequestOutput, None]:
        """The engine's; images give way to those of requests that have none."""
        async with aclosing(self.engine.generate(request, images)) as outputs:
            with nullcontext() if self.images is None or images else self.images.pace.stream() as stream:
                async for output in outputs:
                    if stream is not None:
                        stream.take(len(output.token_ids))
                    yield output

    def _log_accepted(self, job: Job) -> None:
        request = job.request
        log.debug("request accepted request_id=%s prompt_tokens=%d", request.request_id, len(request.prompt_token_ids))
        if self.log_prompts:
            shown = request.prompt_token_ids if self.tokenizer is None else self.prompt_text(job)[0]
            log.info("prompt request_id=%s text=%r", request.request_id, shown)

    async def status(self) -> ClusterStatus:
        """The server's state. Raises RequestRejected (UNAVAILABLE) when it cannot be had."""
        try:
            return await self.engine.status()
        except Exception as error:
            log.exception("no status")
            raise RequestRejected("the controller does not answer", code=ErrorCode.UNAVAILABLE) from error

    async def abort(self, request_ids: Iterable[str]) -> int:
        """Ends requests by their ids, as answered or as sent in X-Request-Id, or single answers by `id-index`.

        Returns how many answers that were.
        """
        indices = ("", *(f"-{index}" for index in range(MAX_CHOICES)))
        names = [
            f"{prefix}{i}{index}" for i in request_ids for prefix in ("", "cmpl-", "chatcmpl-") for index in indices
        ]
        return await self.engine.abort(names)

    async def drain(self) -> int:
        """Stops admission for good; returns how many accepted requests have not ended.

        Raises RequestRejected (UNAVAILABLE) when the controller does not answer.
        """
        try:
            return await self.engine.drain()
        except Exception as error:
            log.exception("no drain")
            raise RequestRejected("the controller does not answer", code=ErrorCode.UNAVAILABLE) from error

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


async def _tokenise(characters: int, encode: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`encode(*args)`, in a thread if there is much to encode."""
    if characters > _LONG_TEXT:
        return await asyncio.to_thread(encode, *args, **kwargs)
    return encode(*args, **kwargs)
