"""Many streams at once over gRPC, with the time of every token; for tests that do harm meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc

from herder.v1 import inference_pb2, inference_pb2_grpc, types_pb2


@dataclass
class Stream:
    """One answer: its tokens, when each came (time.monotonic), and what ended it other than its length."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    error: str = ""

    def longest_gap(self, since: float, until: float) -> float:
        """The longest time without a token, in seconds, of those that end or begin between these moments."""
        gaps = [
            later - earlier
            for earlier, later in zip(self.times, self.times[1:], strict=False)
            if later > since and earlier < until
        ]
        return max(gaps, default=0.0)


def prompt(number: int) -> list[int]:
    """1 to 40 tokens, different for each number."""
    return [(number * 31 + place * 17) % 250 + 1 for place in range(1 + number * 7 % 40)]


def request(number: int, max_tokens: int) -> inference_pb2.GenerateRequest:
    """Every second one is greedy, the others sample with a seed."""
    sampling: dict[str, object] = {"max_tokens": max_tokens, "ignore_eos": True}
    sampling |= {"temperature": 0.0} if number % 2 == 0 else {"temperature": 1.0, "seed": number}
    return inference_pb2.GenerateRequest(token_ids={"ids": prompt(number)}, sampling=sampling)


async def run_streams(
    address: str, numbers: Sequence[int], max_tokens: int, streams: dict[int, Stream] | None = None
) -> dict[int, Stream]:
    """All of these streams at once, each by its number; `streams` can be looked at while they run."""
    found = {} if streams is None else streams
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)

        async def one(number: int) -> None:
            stream = found[number] = Stream()
            try:
                async for message in stub.GenerateStream(request(number, max_tokens), timeout=240):
                    if message.HasField("error"):
                        stream.error = str(message.error)
                    if message.HasField("tokens"):
                        now = time.monotonic()
                        stream.tokens += message.tokens.token_ids
                        stream.times += [now] * len(message.tokens.token_ids)
                    if (
                        message.HasField("finished")
                        and message.finished.finish_reason != types_pb2.FINISH_REASON_LENGTH
                    ):
                        stream.error = str(message.finished)
            except grpc.RpcError as error:
                stream.error = str(error)

        await asyncio.gather(*(one(number) for number in numbers))
    return found
