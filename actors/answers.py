"""An answer on its way out: the job it belongs to, its pieces, and how they come of the engine's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from actors.tool_use import CallEvent, ToolUse
from engine.detokenizer import TextStream
from engine.request import FinishReason, Request, RequestError, RequestOutput, TokenLogprob
from engine.tool_parser import ToolParser
from engine.tools import ContentDelta

# The gateway's own reason for an answer's end; the engine knows nothing of tools.
TOOL_CALLS: Literal["tool_calls"] = "tool_calls"


@dataclass(frozen=True)
class Job:
    """One answer to a prompt that passed validation.

    `images`: the encoded files of `request.images`; `choice` counts the answers to the same prompt;
    `skip_special_tokens`: the text leaves special tokens out.
    """

    request: Request
    images: tuple[bytes, ...] = ()
    choice: int = 0
    skip_special_tokens: bool = True
    tools: ToolUse = field(default_factory=ToolUse)


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer, or a whole one (`join`). The last piece has a finish reason.

    `text` lags behind `token_ids` while a character is incomplete or a stop string possible. `logprobs` (if asked for)
    and `offsets`, the number of the answer's characters before it, are per token. `prompt_logprobs` come once, with the
    piece that ends the prefill; so do `cached_tokens`, of the prompt. `calls` are of tools: no part of `text`.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    offsets: tuple[int, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    cached_tokens: int = 0
    calls: tuple[CallEvent, ...] = ()
    finish_reason: FinishReason | Literal["tool_calls"] | None = None
    error: RequestError | None = None


def join(deltas: Sequence[Delta]) -> Delta:
    """All pieces of an answer as one."""
    return Delta(
        text="".join(d.text for d in deltas),
        token_ids=tuple(t for d in deltas for t in d.token_ids),
        logprobs=tuple(p for d in deltas for p in d.logprobs),
        offsets=tuple(o for d in deltas for o in d.offsets),
        prompt_logprobs=tuple(p for d in deltas for p in d.prompt_logprobs),
        cached_tokens=sum(d.cached_tokens for d in deltas),
        calls=tuple(c for d in deltas for c in d.calls),
        finish_reason=deltas[-1].finish_reason,
        error=deltas[-1].error,
    )


class UsageCount:
    """Tokens that the answers to one or more prompts take. A prompt counts once, however many answers it has."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self.prompt_tokens = sum(len(job.request.prompt_token_ids) for job in jobs if job.choice == 0)
        self.completion_tokens = 0
        self.cached_tokens = 0

    def add(self, index: int, delta: Delta) -> None:
        """A piece of the answer to `jobs[index]`."""
        self.completion_tokens += len(delta.token_ids)
        if self._jobs[index].choice == 0:
            self.cached_tokens += delta.cached_tokens


class CallFinder:
    """Takes the calls out of an answer's text, if tools are offered."""

    def __init__(self, tools: ToolUse) -> None:
        self._tools = tools
        self._parser: ToolParser | None = tools.parser()
        self._called = False

    def take_out(self, delta: Delta) -> Delta:
        if self._parser is None:
            return delta
        events = self._parser.push(delta.text) if delta.text else []
        if delta.finish_reason is not None:
            events += self._parser.finish()
        text = "".join(event.text for event in events if isinstance(event, ContentDelta))
        calls = tuple(e for e in events if not isinstance(e, ContentDelta) and self._tools.keep(e))
        self._called = self._called or bool(calls)
        called = self._called and delta.finish_reason is FinishReason.STOP
        return replace(delta, text=text, calls=calls, finish_reason=TOOL_CALLS if called else delta.finish_reason)


def piece_of(stream: TextStream, output: RequestOutput) -> Delta:
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
        cached_tokens=output.cached_tokens,
        finish_reason=reason,
        error=output.error if reason is FinishReason.ERROR else None,
    )
