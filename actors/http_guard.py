"""What is looked at before a request's body is: its API key and its size."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.api_keys import REFUSAL, ApiKeys
from actors.http_answers import Answer, error_body

_OPEN = frozenset({"/health", "/health/ready"})  # for those who watch the server, and have no key


class Guard:
    """ASGI middleware: 401 without a valid key, 413 for a body of more than `max_body_bytes`."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, max_body_bytes: int) -> None:
        self._app = app
        self._keys = keys
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers: dict[bytes, bytes] = dict(scope["headers"])
        authorization = headers.get(b"authorization", b"").decode("latin-1")
        if scope["path"] not in _OPEN and not self._keys.admit(authorization):
            body = error_body(REFUSAL, "invalid_request_error", code="invalid_api_key")
            return await Answer(body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > self._max_body_bytes:
            body = error_body(self._too_large(), "invalid_request_error", code="request_too_large")
            return await Answer(body, 413, {"Connection": "close"})(scope, receive, send)
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise HTTPException(413, self._too_large())
            return message

        return await self._app(scope, counted, send)

    def _too_large(self) -> str:
        return f"the body must be at most {self._max_body_bytes} bytes"
