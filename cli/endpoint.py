"""Asking a running deployment, over HTTP (server-sent events) or gRPC.

Both ways give the same: an iterator of text pieces. All that goes wrong becomes a CliError with the server's sentence.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx

from cli.report import CliError
from cli.runfile import Run, find_run
from herder.v1 import control_pb2_grpc, inference_pb2, inference_pb2_grpc, types_pb2

# A first token may be long in coming (a long prompt, a full server), a connection may not.
TIMEOUT = httpx.Timeout(None, connect=5.0)
LOOK_TIMEOUT_S = 10.0
API_KEY = "HERDER_API_KEY"  # the environment variable for servers that are not this user's own


@dataclass(frozen=True, slots=True)
class Server:
    """Where a server answers over one of the two interfaces, and what it wants to see.

    `where`: a URL, or host:port for gRPC. `roots`: for gRPC, what its certificate is checked against (PEM); empty: the
    usual roots; None: no TLS.
    """

    where: str
    api_key: str = ""
    roots: bytes | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return tuple(self.headers.items())

    def channel(self) -> grpc.Channel:
        if self.roots is None:
            return grpc.insecure_channel(self.where)
        return grpc.secure_channel(self.where, grpc.ssl_channel_credentials(self.roots or None))

    def aio_channel(self) -> grpc.aio.Channel:
        if self.roots is None:
            return grpc.aio.insecure_channel(self.where)
        return grpc.aio.secure_channel(self.where, grpc.ssl_channel_credentials(self.roots or None))


@dataclass(frozen=True, slots=True)
class Message:
    """`images`: files' bytes, or URLs. The model sees them in their order, before the text."""

    role: str
    text: str
    images: tuple[bytes | str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sampling:
    """What a request asks for beside its messages. None: the server's default."""

    model: str | None = None
    temperature: float = 0.0
    max_tokens: int | None = None


def http_server(url: str | None, http_port: int | None = None) -> Server:
    """The one at `url`, or where the deployment of this user answers HTTP."""
    if url is None:
        run = _serving(http_port)
        return Server(run.http_url, run.api_key)
    return Server((url if "://" in url else f"http://{url}").rstrip("/"), os.environ.get(API_KEY, ""))


def grpc_server(url: str | None, http_port: int | None = None) -> Server:
    """The one at `url` (host:port; with `grpcs://` before it, over TLS), or where this user's own answers gRPC."""
    if url is None:
        run = _serving(http_port)
        return Server(run.grpc_address, run.api_key, Path(run.grpc_cert).read_bytes() if run.grpc_cert else None)
    scheme, _, address = url.rpartition("://")
    roots = b"" if scheme in ("grpcs", "https") else None
    return Server(address.rstrip("/"), os.environ.get(API_KEY, ""), roots)


def _serving(http_port: int | None) -> Run:
    run = find_run(http_port)
    if not run.serving:
        raise CliError(f"the deployment of {run.config} (pid {run.pid}) is still starting")
    return run


# HTTP


def chat_body(messages: Sequence[Message], sampling: Sampling, model: str, stream: bool) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": message.role, "content": _content(message)} for message in messages],
        "temperature": sampling.temperature,
        "stream": stream,
    }
    if sampling.max_tokens is not None:
        body["max_tokens"] = sampling.max_tokens
    return body


def _content(message: Message) -> str | list[dict[str, Any]]:
    if not message.images:
        return message.text
    images = [{"type": "image_url", "image_url": {"url": _image_url(image)}} for image in message.images]
    return [*images, {"type": "text", "text": message.text}]


def _image_url(image: bytes | str) -> str:
    if isinstance(image, str):
        return image
    return f"data:application/octet-stream;base64,{base64.b64encode(image).decode()}"  # servers look at the bytes


def http_model(server: Server) -> str:
    """The name of the model that is served there."""
    url = server.where
    try:
        response = httpx.get(f"{url}/v1/models", timeout=LOOK_TIMEOUT_S, headers=server.headers)
        check_http(url, response)
        return str(response.json()["data"][0]["id"])
    except httpx.HTTPError as error:
        raise http_fault(url, error) from None
    except (ValueError, LookupError, TypeError):
        raise CliError(f"{url}/v1/models does not answer as an OpenAI-compatible server does") from None


def stream_http(server: Server, messages: Sequence[Message], sampling: Sampling) -> Iterator[str]:
    """The answer to `messages` in pieces as they come."""
    body = chat_body(messages, sampling, sampling.model or http_model(server), stream=True)
    url = server.where
    try:
        with httpx.stream(
            "POST", f"{url}/v1/chat/completions", json=body, timeout=TIMEOUT, headers=server.headers
        ) as response:
            if response.is_error:
                response.read()
            check_http(url, response)
            yield from sse_text(response.iter_lines())
    except httpx.HTTPError as error:
        raise http_fault(url, error) from None


def sse_text(lines: Iterable[str]) -> Iterator[str]:
    """The text pieces of a chat completion's event stream."""
    for line in lines:
        field, _, data = line.partition(":")
        data = data.strip()
        if field != "data" or not data:
            continue
        if data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise CliError(_error_message(event))
        for choice in event.get("choices", ()):
            if text := choice.get("delta", {}).get("content"):
                yield text
    raise CliError("the server closed the stream before its end")


def check_http(url: str, response: httpx.Response) -> None:
    """Raises CliError with the server's own sentence if `response` is an error."""
    if not response.is_error:
        return
    try:
        message = _error_message(response.json())
    except ValueError:
        message = ""
    raise CliError(message or f"{url} answered {response.status_code} {response.reason_phrase}")


def _error_message(body: Any) -> str:
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(message or "").split())


def http_fault(url: str, error: httpx.HTTPError) -> CliError:
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return CliError(f"nothing answers at {url}")
    return CliError(f"the connection to {url} broke: {str(error) or type(error).__name__}")


# gRPC


def chat_stream_request(messages: Sequence[Message], sampling: Sampling) -> inference_pb2.ChatStreamRequest:
    return inference_pb2.ChatStreamRequest(
        model=sampling.model or "",
        messages=[inference_pb2.ChatMessage(role=message.role, content=_parts(message)) for message in messages],
        sampling=types_pb2.SamplingParams(temperature=sampling.temperature, max_tokens=sampling.max_tokens),
    )


def _parts(message: Message) -> list[inference_pb2.ContentPart]:
    items = [
        inference_pb2.MediaItem(url=image) if isinstance(image, str) else inference_pb2.MediaItem(data=image)
        for image in message.images
    ]
    return [*(inference_pb2.ContentPart(image=item) for item in items), inference_pb2.ContentPart(text=message.text)]


def stream_grpc(server: Server, messages: Sequence[Message], sampling: Sampling) -> Iterator[str]:
    """As stream_http, over InferenceService.ChatStream."""
    with server.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.ChatStream(chat_stream_request(messages, sampling), metadata=server.metadata)
        try:
            for response in call:
                yield event_text(response)
        except grpc.RpcError as error:
            raise grpc_fault(server.where, error) from None
        finally:
            call.cancel()


def event_text(response: inference_pb2.ChatStreamResponse) -> str:
    if response.WhichOneof("event") == "error":
        raise CliError(response.error.message)
    return response.tokens.text


@contextmanager
def control(server: Server) -> Iterator[control_pb2_grpc.ControlServiceStub]:
    """The control service there. A call of it that fails becomes a CliError."""
    with server.channel() as channel:
        try:
            yield control_pb2_grpc.ControlServiceStub(channel)
        except grpc.RpcError as error:
            raise grpc_fault(server.where, error) from None


def grpc_fault(address: str, error: grpc.RpcError) -> CliError:
    code, details = error.code(), " ".join((error.details() or "").split())
    if code == grpc.StatusCode.UNAVAILABLE and "connect" in details:
        return CliError(f"nothing answers at {address}")
    return CliError(details or f"{address} answered {code.name}")
