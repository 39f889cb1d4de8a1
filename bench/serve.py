"""An open-loop load generator: requests come when they are due, whether or not earlier ones are answered."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from bench.clients import AskFailed, Client, GrpcClient, HttpClient
from bench.common import JsonFile, Report
from bench.cpu_share import CpuTimes, share_rows
from bench.load import Ask, Lengths, Timing, asks_from_file, latencies, random_asks, summary

Protocol = Literal["http", "grpc"]


async def ask_one(client: Client, ask: Ask, start: float) -> Timing:
    """Waits until the request is due, asks, and times the answer."""
    due = start + ask.at
    await asyncio.sleep(max(0.0, due - time.perf_counter()))
    first: float | None = None
    tokens = 0
    error = None
    try:
        async for count in client.stream(ask):
            if count and first is None:
                first = time.perf_counter() - due
            tokens += count
    except AskFailed as failed:
        error = str(failed)
    last = time.perf_counter() - due
    if error is None and tokens != ask.max_tokens:
        error = f"{tokens} tokens came instead of {ask.max_tokens}"
    return Timing(first, last, tokens, error)


async def run(client: Client, asks: Sequence[Ask]) -> tuple[list[Timing], float]:
    """All timings, and how long it took from the first request to the last answer."""
    start = time.perf_counter()
    try:
        timings = await asyncio.gather(*(ask_one(client, ask, start) for ask in asks))
    finally:
        await client.close()
    return list(timings), time.perf_counter() - start


def main(
    protocol: Annotated[Protocol, typer.Option(help="Which endpoint to load.")] = "http",
    url: Annotated[str, typer.Option(help="HTTP endpoint.")] = "http://127.0.0.1:8000",
    grpc_address: Annotated[str, typer.Option(help="gRPC endpoint.")] = "127.0.0.1:9000",
    model: Annotated[str | None, typer.Option(help="Served model's name; default: the only one.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="How many requests.")] = 64,
    rate: Annotated[float | None, typer.Option(help="Mean arrivals per second; default: all at once.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help='JSON lines {"prompt": text or token ids}.')
    ] = None,
    prompt_tokens: Annotated[tuple[int, int], typer.Option(help="Range of random prompts' lengths.")] = (16, 256),
    max_tokens: Annotated[tuple[int, int], typer.Option(help="Range of answers' lengths.")] = (64, 64),
    vocab_size: Annotated[int, typer.Option(help="Random prompts' token ids are below it.")] = 32000,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    slo_ttft: Annotated[float, typer.Option(help="Objective for the first token, ms.")] = 1000.0,
    slo_tpot: Annotated[float, typer.Option(help="Objective for the mean time per output token, ms.")] = 100.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same requests at the same times.")] = 0,
    cpu_share: Annotated[bool, typer.Option("--cpu-share", help="CPU time by group of local processes.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Load a running server with seeded Poisson arrivals and print throughput, latency percentiles and goodput.

    Times count from when a request was due, so that a server that falls behind cannot hide it.
    """
    if prompts is not None:
        asks = asks_from_file(prompts, requests, rate, max_tokens[1], seed)
    else:
        asks = random_asks(requests, rate, Lengths(*prompt_tokens, *max_tokens), vocab_size, seed)
    report = Report(f"serve, {protocol}, {requests} requests, " + (f"{rate}/s" if rate else "at once"))
    endpoint = url if protocol == "http" else grpc_address
    before = CpuTimes.now()

    async def load() -> tuple[list[Timing], float]:
        client = (HttpClient if protocol == "http" else GrpcClient)(endpoint, model, temperature)
        return await run(client, asks)

    timings, elapsed = asyncio.run(load())
    used = CpuTimes.now().since(before)
    report.add("throughput", [summary(timings, elapsed, slo_ttft / 1e3, slo_tpot / 1e3)])
    report.add("latency", latencies(timings), "from when the request was due")
    errors = Counter(timing.error for timing in timings if timing.error is not None)
    if errors:
        report.add("errors", [{"error": text[:200], "requests": count} for text, count in errors.most_common(10)])
    if cpu_share:
        report.add("CPU", share_rows(used, elapsed), "of this machine's processes, without the load generator")
    report.save(json_file)


if __name__ == "__main__":
    typer.run(main)
