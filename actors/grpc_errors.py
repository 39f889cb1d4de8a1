"""How a gRPC call is let in, and how it ends when it is not answered."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import NoReturn, Protocol, runtime_checkable

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from actors.api_keys import REFUSAL, ApiKeys
from actors.validation import deadline_after, is_retryable
from engine.request import ErrorCode, RequestRejected

_MAX_DETAILS = 1000  # characters; HTTP/2 trailers are small
_DETAILS_KEY = "grpc-status-details-bin"
_RETRY_AFTER = duration_pb2.Duration(seconds=1)


class Context(Protocol):
    """Ray Serve's RayServegRPCContext: a status set on it before an exception is raised becomes the call's."""

    def set_code(self, code: grpc.StatusCode) -> None: ...

    def set_details(self, details: str) -> None: ...

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


@runtime_checkable
class ServerContext(Protocol):
    """What a grpc.aio server's own context has beside that."""

    async def abort(
        self, code: grpc.StatusCode, details: str, trailing_metadata: tuple[tuple[str, str | bytes], ...]
    ) -> NoReturn: ...

    def time_remaining(self) -> float | None: ...


class Unauthenticated(PermissionError):
    """A call without a valid API key."""


@asynccontextmanager
async def admitted(request: Message, context: Context, keys: ApiKeys, max_bytes: int) -> AsyncIterator[None]:
    """Lets a call in that has a valid key and a message of a fair size.

    Any RequestRejected, here or within, ends the call with its code and sentence.
    """
    try:
        if not keys.admit(_authorization(context)):
            raise Unauthenticated(REFUSAL)
        if request.ByteSize() > max_bytes:
            raise RequestRejected(
                f"the message has {request.ByteSize()} bytes, more than the {max_bytes} that are taken",
                code=ErrorCode.RESOURCE_EXHAUSTED,
            )
        yield
    except Unauthenticated as error:
        await _end(context, grpc.StatusCode.UNAUTHENTICATED, str(error), [])
        raise
    except RequestRejected as error:
        await _end(context, grpc.StatusCode[error.code.name], str(error)[:_MAX_DETAILS], rich_details(error))
        raise


def deadline(context: Context, timeout_s: float | None) -> float | None:
    """The earlier one of the request's timeout and the call's deadline, where that can be known; in Unix seconds."""
    now = time.time()
    asked = deadline_after(timeout_s, now)
    remaining = context.time_remaining() if isinstance(context, ServerContext) else None
    if remaining is None:
        return asked
    return now + remaining if asked is None else min(asked, now + remaining)


def rich_details(error: RequestRejected) -> list[Message]:
    """What google.rpc.Status carries beside code and sentence."""
    if is_retryable(error):
        return [error_details_pb2.RetryInfo(retry_delay=_RETRY_AFTER)]
    if error.field is None:
        return []
    violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=str(error)[:_MAX_DETAILS])
    return [error_details_pb2.BadRequest(field_violations=[violation])]


def _authorization(context: Context) -> str | None:
    for name, value in context.invocation_metadata() or ():
        if name.lower() == "authorization":
            return value if isinstance(value, str) else value.decode("latin-1")
    return None


async def _end(context: Context, code: grpc.StatusCode, message: str, details: list[Message]) -> None:
    """Gives the call its status; a server's own context then leaves by an exception."""
    if not isinstance(context, ServerContext):
        context.set_code(code)
        context.set_details(message)
        return
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    status = status_pb2.Status(code=code.value[0], message=message, details=packed)
    await context.abort(code, message, ((_DETAILS_KEY, status.SerializeToString()),))
