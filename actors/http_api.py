"""OpenAI-compatible HTTP: the application, and its errors."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from actors.api_keys import NO_KEYS, ApiKeys
from actors.current_span import current_span
from actors.gateway_core import GatewayCore
from actors.http_answers import Answer, error_body, error_response
from actors.http_generate import add_generation
from actors.http_guard import Guard
from actors.http_inspect import add_inspection
from engine.request import RequestRejected

log = logging.getLogger("herder")

# By status: OpenAI's code of the error.
_CODES = {413: "request_too_large"}


def build_http_app(core: GatewayCore, keys: ApiKeys = NO_KEYS, max_body_bytes: int = 16 * 2**20) -> FastAPI:
    """The HTTP interface of one served model. Without keys, everybody is let in."""
    app = FastAPI(title="Herder", strict_content_type=False)
    _add_error_handlers(app)
    if core.tracing is not None:
        from actors.http_tracing import Traced

        app.add_middleware(Traced, tracing=core.tracing, model=core.model.name)
    app.add_middleware(Guard, keys=keys, max_body_bytes=max_body_bytes)
    add_inspection(app, core)
    add_generation(app, core)
    return app


def _add_error_handlers(app: FastAPI) -> None:
    """Every error in OpenAI's form."""

    @app.exception_handler(RequestRejected)
    async def rejected(request: Request, error: RequestRejected) -> Response:
        return _refuse(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _refuse(request, _rejection(error))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        detail = error.detail
        if error.status_code == 404:
            detail = f"there is no {request.method} {request.url.path}"
        elif error.status_code == 405:
            detail = f"{request.method} is not allowed at {request.url.path}"
        body = error_body(detail, "invalid_request_error", code=_CODES.get(error.status_code))
        return Answer(body, error.status_code, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it; the access log does

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        log.error("request failed", exc_info=error)
        return Answer(error_body("the request failed inside the server", "server_error", code="internal"), 500)


def _refuse(request: Request, error: RequestRejected) -> Response:
    """The error's sentence is for the client alone: it may quote what was asked."""
    if (span := current_span()) is not None:
        span.fail(error.code)
    request_id = request.headers.get("x-request-id")
    log.info("request refused request_id=%.128s path=%s code=%s", request_id, request.url.path, error.code)
    return error_response(error)


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
