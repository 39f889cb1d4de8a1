"""The spans of requests that come over HTTP."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.tracing import Tracing

_OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}


class Traced:
    """ASGI middleware: a span around each request to the model, until its last byte is sent."""

    def __init__(self, app: ASGIApp, tracing: Tracing, model: str) -> None:
        self._app = app
        self._tracing = tracing
        self._model = model

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        operation = _OPERATIONS.get(scope["path"]) if scope["type"] == "http" else None
        if operation is None:
            return await self._app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        with self._tracing.request(operation, self._model, headers) as span:

            async def noted(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set("http.response.status_code", message["status"])
                await send(message)

            await self._app(scope, receive, noted)
