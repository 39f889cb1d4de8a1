"""OpenAI-compatible HTTP."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TypeAlias

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from actors.gateway_core import Delta, GatewayCore, Job, join
from actors.http_answers import (
    ChatChoice,
    CompletionChoice,
    Envelope,
    JsonObject,
    error_body,
    error_of,
    is_retryable,
    sse,
    usage,
)
from actors.http_schema import ChatBody, CompletionBody
from actors.http_streams import EventStream, merge, unless_disconnected
from actors.validation import check_model, make_request_id
from engine.request import RequestError, RequestRejected

log = logging.getLogger("herder")

Pieces: TypeAlias = AsyncGenerator[tuple[int, Delta], None]
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's


def build_http_app(core: GatewayCore) -> FastAPI:
    """The HTTP interface of one served model."""
    app = FastAPI(title="Herder", strict_content_type=False)
    _add_error_handlers(app)

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "alive"})

    @app.get("/health/ready")
    async def ready() -> Response:
        try:
            status = await core.status()
        except RequestRejected as error:
            return JSONResponse({"status": "not ready", "reason": str(error)}, 503)
        if not status.ready:
            return JSONResponse({"status": "not ready", "reason": status.reason}, 503)
        return JSONResponse({"status": "ready"})

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model_card(core)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        check_model(core.model, name)
        return JSONResponse(_model_card(core))

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        check_model(core.model, body.model)
        answer_id = _answer_id("cmpl-", body.request_id, request)
        jobs = []
        for index, prompt in enumerate(body.prompt):
            token_ids = await core.encode(prompt) if isinstance(prompt, str) else prompt
            job_id = answer_id if len(body.prompt) == 1 else f"{answer_id}-{index}"
            jobs.append(core.accept(job_id, token_ids, body.sampling(), DEFAULT_COMPLETION_TOKENS))
        choices = [CompletionChoice(core, body, index, job) for index, job in enumerate(jobs)]
        envelope = Envelope.new(answer_id, "text_completion", core.model.name)
        pieces = merge([core.generate(job) for job in jobs])
        makers = [choice.choice for choice in choices]
        if body.stream:
            return await _stream(request, envelope, jobs, makers, pieces, body.include_usage)
        return await _whole(request, envelope, jobs, makers, pieces)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        check_model(core.model, body.model)
        answer_id = _answer_id("chatcmpl-", body.request_id, request)
        token_ids = await core.encode_chat([message.for_template() for message in body.messages])
        job = core.accept(answer_id, token_ids, body.sampling())
        choice = ChatChoice(core, body, job)
        pieces = merge([core.generate(job)])
        if body.stream:
            envelope = Envelope.new(answer_id, "chat.completion.chunk", core.model.name)
            return await _stream(request, envelope, [job], [choice.chunk], pieces, body.include_usage)
        envelope = Envelope.new(answer_id, "chat.completion", core.model.name)
        return await _whole(request, envelope, [job], [choice.choice], pieces)

    return app


async def _whole(
    request: Request,
    envelope: Envelope,
    jobs: Sequence[Job],
    makers: Sequence[Callable[[Delta], JsonObject]],
    pieces: Pieces,
) -> Response:
    """Everything in one object."""

    async def collect() -> list[list[Delta]]:
        found: list[list[Delta]] = [[] for _ in jobs]
        async for index, delta in pieces:
            found[index].append(delta)
        return found

    answers = [join(deltas) for deltas in await unless_disconnected(request.receive, collect())]
    for answer in answers:
        if answer.error is not None:
            return _error_response(answer.error)
    choices = [make(answer) for make, answer in zip(makers, answers, strict=True)]
    generated = sum(len(answer.token_ids) for answer in answers)
    return JSONResponse(envelope.wrap(choices, usage=usage(jobs, generated)))


async def _stream(
    request: Request,
    envelope: Envelope,
    jobs: Sequence[Job],
    makers: Sequence[Callable[[Delta], JsonObject]],
    pieces: Pieces,
    include_usage: bool,
) -> Response:
    """Server-sent events, from when the first piece is there: until then, a failure is still a status code."""
    index, delta = await unless_disconnected(request.receive, anext(pieces))
    if delta.error is not None:
        await pieces.aclose()
        return _error_response(delta.error)
    more: JsonObject = {"usage": None} if include_usage else {}

    async def events() -> AsyncGenerator[str, None]:
        generated = len(delta.token_ids)
        yield sse(envelope.wrap([makers[index](delta)], **more))
        try:
            async for i, piece in pieces:
                generated += len(piece.token_ids)
                if piece.error is not None:
                    yield sse(error_of(piece.error)[1])
                    break
                # A piece without text says nothing, unless the client wants something of each token.
                choice = makers[i](piece)
                if piece.text or piece.finish_reason or choice["logprobs"] or "token_ids" in choice:
                    yield sse(envelope.wrap([choice], **more))
            else:
                if include_usage:
                    yield sse(envelope.wrap([], usage=usage(jobs, generated)))
        except RequestRejected as error:  # one of several prompts, after another one's first piece
            yield sse(error_of(error)[1])
        yield "data: [DONE]\n\n"

    return EventStream(events(), pieces)


def _answer_id(prefix: str, given: str | None, request: Request) -> str:
    """`request_id` of the body as it is, or the X-Request-Id header after OpenAI's prefix, or a new one.

    Ray Serve's proxy puts a header of its own on requests without one, so the header alone cannot be taken as it is.
    """
    if given is not None:
        return make_request_id(prefix, given)
    header = request.headers.get("x-request-id")
    return make_request_id(prefix, header and prefix + header)


def _model_card(core: GatewayCore) -> JsonObject:
    model = core.model
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "herder",
        "max_model_len": model.max_context,
    }


def _error_response(error: RequestRejected | RequestError) -> Response:
    status, body = error_of(error)
    return JSONResponse(body, status, {"Retry-After": "1"} if is_retryable(error) else None)


def _add_error_handlers(app: FastAPI) -> None:
    """Every error in OpenAI's form."""

    @app.exception_handler(RequestRejected)
    async def rejected(_: Request, error: RequestRejected) -> Response:
        return _error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return _error_response(_rejection(error))

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        body = error_body(str(error.detail), "invalid_request_error", code=None)
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it; the access log does

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        log.error("request failed", exc_info=error)
        return JSONResponse(error_body("the request failed inside the server", "server_error", code="internal"), 500)


def _rejection(error: RequestValidationError) -> RequestRejected:
    """The first thing that is wrong with a body, in a sentence that begins with its field."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, RequestRejected):
        return cause
    if first["type"] == "json_invalid":
        return RequestRejected(f"the body is not valid JSON: {cause}")
    if not (path := first["loc"][1:]):
        return RequestRejected("the body must be a JSON object")
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    # A field of several types lists an error for each type, named behind the field.
    message = first["msg"][0].lower() + first["msg"][1:]
    return RequestRejected(f"{where}: {message}", field=str(path[0]))
