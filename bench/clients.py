"""Streaming clients of both endpoints: how many tokens came when."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

import grpc
import httpx

from bench.common import Result
from bench.load import Ask
from herder.v1 import inference_pb2, inference_pb2_grpc, types_pb2

TIMEOUT_S = 600.0


class AskFailed(RuntimeError):
    """The server refused a request, or ended it with an error."""


class Client(Protocol):
    def stream(self, ask: Ask) -> AsyncIterator[int]:
        """The number of tokens in each message of the answer, as they come. Raises AskFailed."""

    async def close(self) -> None: ...


class HttpClient:
    """POST /v1/completions with server-sent events."""

    def __init__(self, url: str, model: str | None, temperature: float) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits)
        self._common: dict[str, object] = {
            "temperature": temperature,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        if model is not None:
            self._common["model"] = model

    async def stream(self, ask: Ask) -> AsyncIterator[int]:
        body = {**self._common, "prompt": ask.prompt, "max_tokens": ask.max_tokens}
        try:
            async with self._client.stream("POST", "/v1/completions", json=body) as answer:
                if answer.status_code != 200:
                    raise AskFailed(f"HTTP {answer.status_code}: {(await answer.aread()).decode(errors='replace')}")
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line[len("data: ") :])
                        if "error" in event:
                            raise AskFailed(event["error"]["message"])
                        yield sum(len(choice["token_ids"]) for choice in event["choices"])
        except httpx.HTTPError as error:
            raise AskFailed(f"{type(error).__name__}: {error}") from error

    async def close(self) -> None:
        await self._client.aclose()


class GrpcClient:
    """InferenceService.GenerateStream."""

    def __init__(self, address: str, model: str | None, temperature: float) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._model = model or ""
        self._temperature = temperature

    async def stream(self, ask: Ask) -> AsyncIterator[int]:
        request = inference_pb2.GenerateStreamRequest(
            model=self._model,
            sampling=types_pb2.SamplingParams(
                max_tokens=ask.max_tokens, temperature=self._temperature, ignore_eos=True
            ),
        )
        if isinstance(ask.prompt, str):
            request.text = ask.prompt
        else:
            request.token_ids.ids.extend(ask.prompt)
        try:
            async for event in self._stub.GenerateStream(request, timeout=TIMEOUT_S):
                if event.HasField("error"):
                    raise AskFailed(event.error.message)
                yield len(event.tokens.token_ids)
        except grpc.aio.AioRpcError as error:
            raise AskFailed(f"{error.code().name}: {error.details()}") from error

    async def close(self) -> None:
        await self._channel.close()


def over_grpc(address: str, work: Callable[[Client], Awaitable[Result]]) -> Result:
    """The result of `work` with a client of its own; greedy, of the server's own model."""

    async def run() -> Result:
        client = GrpcClient(address, None, 0.0)
        try:
            return await work(client)
        finally:
            await client.close()

    return asyncio.run(run())
