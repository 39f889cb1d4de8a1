"""POST /v1/completions and /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from fastapi import FastAPI, Request
from fastapi.responses import Response

from actors.answers import Delta, Job, UsageCount, join
from actors.gateway_core import GatewayCore
from actors.http_answers import Answer, Envelope, JsonObject, error_of, error_response, sse, usage
from actors.http_chat_schema import ChatBody
from actors.http_choices import ChatChoice, CompletionChoice, prompt_logprobs
from actors.http_schema import Body, CompletionBody
from actors.http_streams import EventStream, unless_disconnected
from actors.image_prompt import Prompt
from actors.merge import merge
from actors.validation import check_model, deadline_after, make_request_id
from engine.request import RequestRejected

Pieces: TypeAlias = AsyncGenerator[tuple[int, Delta], None]
Maker: TypeAlias = Callable[[Delta], JsonObject]
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's


@dataclass(frozen=True)
class _Asked:
    """A request that passed validation, and how its answers are written: `makers` has a function for each job."""

    request: Request
    envelope: Envelope
    jobs: Sequence[Job]
    makers: Sequence[Maker]
    pieces: Pieces


def add_generation(app: FastAPI, core: GatewayCore) -> None:
    """The routes that ask the model."""

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        check_model(core.model, body.model)
        deadline = _deadline(body, request)
        answer_id = _answer_id("cmpl-", body.request_id, request)
        token_ids = [await core.encode(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompt]
        prompts = list(map(Prompt, token_ids))
        jobs = await core.accept(answer_id, prompts, body.options(deadline), DEFAULT_COMPLETION_TOKENS)
        makers = [CompletionChoice(core, body, index, job).choice for index, job in enumerate(jobs)]
        envelope = Envelope.new(answer_id, "text_completion", core.model.name)
        asked = _Asked(request, envelope, jobs, makers, merge([core.generate(job) for job in jobs]))
        if body.stream:
            return await _stream(asked, body.include_usage)
        return await _whole(asked)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        check_model(core.model, body.model)
        deadline = _deadline(body, request)
        answer_id = _answer_id("chatcmpl-", body.request_id, request)
        tools = body.tool_use()
        # Images may have to be fetched: not for a client that is gone.
        prompt = await unless_disconnected(request.receive, core.encode_chat(body.conversation(), tools, deadline))
        jobs = await core.accept(answer_id, [prompt], body.options(deadline), tools=tools)
        choices = [ChatChoice(core, body, index, job) for index, job in enumerate(jobs)]
        pieces = merge([core.generate(job) for job in jobs])
        if body.stream:
            envelope = Envelope.new(answer_id, "chat.completion.chunk", core.model.name)
            makers = [choice.chunk for choice in choices]
            return await _stream(_Asked(request, envelope, jobs, makers, pieces), body.include_usage)
        envelope = Envelope.new(answer_id, "chat.completion", core.model.name)
        asked = _Asked(request, envelope, jobs, [choice.choice for choice in choices], pieces)

        def more(first: Delta) -> JsonObject:
            if body.prompt_logprobs is None:
                return {}
            return {"prompt_logprobs": prompt_logprobs(core, body, jobs[0], first)}

        return await _whole(asked, more)


async def _whole(asked: _Asked, more: Callable[[Delta], JsonObject] = lambda _: {}) -> Response:
    """Everything in one object; `more` gives further fields of it, from the first answer."""

    async def collect() -> list[list[Delta]]:
        found: list[list[Delta]] = [[] for _ in asked.jobs]
        async for index, delta in asked.pieces:
            found[index].append(delta)
        return found

    answers = [join(deltas) for deltas in await unless_disconnected(asked.request.receive, collect())]
    count = UsageCount(asked.jobs)
    choices = []
    for index, (make, answer) in enumerate(zip(asked.makers, answers, strict=True)):
        if answer.error is not None:
            return error_response(answer.error)
        count.add(index, answer)
        choices.append(make(answer))
    return Answer(asked.envelope.wrap(choices, usage=usage(count), **more(answers[0])))


async def _stream(asked: _Asked, include_usage: bool) -> Response:
    """Server-sent events, from when the first piece is there: until then, a failure is still a status code."""
    index, delta = await unless_disconnected(asked.request.receive, anext(asked.pieces))
    if delta.error is not None:
        await asked.pieces.aclose()
        return error_response(delta.error)
    more: JsonObject = {"usage": None} if include_usage else {}
    envelope, count = asked.envelope, UsageCount(asked.jobs)

    async def events() -> AsyncGenerator[str, None]:
        count.add(index, delta)
        yield sse(envelope.wrap([asked.makers[index](delta)], **more))
        try:
            async for i, piece in asked.pieces:
                count.add(i, piece)
                if piece.error is not None:
                    yield sse(error_of(piece.error)[1])
                    break
                # A piece without text says nothing, unless the client wants something of each token.
                choice = asked.makers[i](piece)
                says = piece.text or piece.calls or piece.finish_reason
                if says or choice["logprobs"] or "token_ids" in choice:
                    yield sse(envelope.wrap([choice], **more))
            else:
                if include_usage:
                    yield sse(envelope.wrap([], usage=usage(count)))
        except RequestRejected as error:  # one of several answers, after another one's first piece
            yield sse(error_of(error)[1])
        yield "data: [DONE]\n\n"

    return EventStream(events(), asked.pieces)


def _answer_id(prefix: str, given: str | None, request: Request) -> str:
    """`request_id` of the body as it is, or the X-Request-Id header after OpenAI's prefix, or a new one.

    Ray Serve's proxy puts a header of its own on requests without one, so the header alone cannot be taken as it is.
    """
    if given is not None:
        return make_request_id(prefix, given)
    header = request.headers.get("x-request-id")
    return make_request_id(prefix, header and prefix + header)


def _deadline(body: Body, request: Request) -> float | None:
    """From `timeout` of the body or the X-Request-Timeout header, in seconds; the body wins. In Unix seconds.

    A request that is not finished by then fails with 504, or with a stream's last event.
    """
    if body.timeout is not None:
        return deadline_after(body.timeout, time.time(), "timeout")
    header = request.headers.get("x-request-timeout")
    if header is None:
        return None
    name = "X-Request-Timeout"
    try:
        seconds = float(header)
    except ValueError:
        raise RequestRejected(f"{name} must be a number of seconds above 0, not {header[:64]!r}", field=name) from None
    return deadline_after(seconds, time.time(), name)
