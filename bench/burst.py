"""What a burst of images costs the streams of a running server: their time per token without and with it."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import httpx
import numpy as np
import typer
from PIL import Image

from bench.clients import TIMEOUT_S, AskFailed, Client, HttpClient
from bench.common import Cell, JsonFile, Report
from bench.load import Ask

_WARM_S = 2.0  # for streams to be under way


@dataclass
class Watched:
    """When each token of each stream came (seconds, of one clock)."""

    streams: list[list[float]] = field(default_factory=list)

    def per_token(self, begin: float, end: float) -> list[float]:
        """For each stream, the mean seconds from token to token within begin..end: several may come at once."""
        windows = [[at for at in times if begin <= at < end] for times in self.streams]
        return [(window[-1] - window[0]) / (len(window) - 1) for window in windows if len(window) > 1]

    def pauses(self, begin: float, end: float) -> list[float]:
        """Seconds from one token to the next of the same stream, within begin..end."""
        windows = [[at for at in times if begin <= at < end] for times in self.streams]
        return [now - before for window in windows for before, now in itertools.pairwise(window)]

    async def follow(self, client: Client, asks: Iterable[Ask]) -> None:
        """One more stream: of these answers, one after another."""
        times: list[float] = []
        self.streams.append(times)
        for ask in asks:
            async for count in client.stream(ask):
                times += [time.perf_counter()] * count


def noise(side: int, seed: int | None = None) -> bytes:
    """A PNG of random pixels; without a seed, one that no server has seen."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def question(model: str, image: bytes, max_tokens: int) -> bytes:
    """The body of a chat request about an image."""
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": max_tokens}
    return json.dumps(body).encode()


async def show(client: httpx.AsyncClient, body: bytes) -> float:
    """Asks about an image; the seconds until the answer. Raises AskFailed."""
    start = time.perf_counter()
    headers = {"content-type": "application/json"}
    answer = await client.post("/v1/chat/completions", content=body, headers=headers)
    if answer.status_code != 200:
        raise AskFailed(f"HTTP {answer.status_code}: {answer.text}")
    return time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class Round:
    """The streams alone and beside the burst (seconds), and how long each image's answer took."""

    alone: list[float]
    beside: list[float]
    longest_pauses: tuple[float, float]
    answers: list[float]


async def one_round(url: str, streams: int, pictures: Sequence[bytes], quiet_s: float, max_tokens: int) -> Round:
    """Streams alone for `quiet_s`, then beside the images, all shown at once, until the last one is answered."""
    watched, client = Watched(), HttpClient(url, None, 0.0)
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) as shower,
        asyncio.TaskGroup() as group,
    ):
        model = (await shower.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
        bodies = [question(model, picture, max_tokens) for picture in pictures]  # before it counts
        tasks = [
            group.create_task(watched.follow(client, itertools.repeat(Ask(0.0, [65 + n], 2000))))
            for n in range(streams)
        ]
        await asyncio.sleep(_WARM_S)
        begin = time.perf_counter()
        await asyncio.sleep(quiet_s)
        middle = time.perf_counter()
        answers = await asyncio.gather(*(show(shower, body) for body in bodies))
        end = time.perf_counter()
        for task in tasks:
            task.cancel()
    await client.close()
    longest = max(watched.pauses(begin, middle)), max(watched.pauses(middle, end))
    return Round(watched.per_token(begin, middle), watched.per_token(middle, end), longest, list(answers))


def rows(rounds: Sequence[Round]) -> list[dict[str, Cell]]:
    """A row for each round: the streams' median time per token, the burst's ratio, and what the images took."""
    found = []
    for number, one in enumerate(rounds, start=1):
        alone, beside = statistics.median(one.alone), statistics.median(one.beside)
        found.append(
            {
                "round": number,
                "ms/token": alone * 1e3,
                "beside images": beside * 1e3,
                "ratio": beside / alone,
                "longest pause ms": one.longest_pauses[0] * 1e3,
                "beside": one.longest_pauses[1] * 1e3,
                "median image s": statistics.median(one.answers),
                "last image s": max(one.answers),
            }
        )
    return found


def main(
    url: Annotated[str, typer.Option(help="HTTP endpoint of a model that takes images.")] = "http://127.0.0.1:8000",
    streams: Annotated[int, typer.Option(min=1, help="Answers that stream all the time.")] = 8,
    images: Annotated[int, typer.Option(min=1, help="Images shown at once, each in a request of its own.")] = 50,
    side: Annotated[int, typer.Option(min=8, help="Width and height of an image, pixels.")] = 224,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer about an image.")] = 8,
    quiet_s: Annotated[float, typer.Option(help="Seconds that the streams are watched alone.")] = 10.0,
    rounds: Annotated[int, typer.Option(min=1, help="How often; every round's images are new.")] = 3,
    json_file: JsonFile = None,
) -> None:
    """Watch streams of a running server alone, then beside a burst of images, and print the ratio."""
    done = []
    for _ in range(rounds):
        pictures = [noise(side) for _ in range(images)]
        done.append(asyncio.run(one_round(url, streams, pictures, quiet_s, max_tokens)))
    report = Report(f"{images} images of {side} x {side} beside {streams} streams")
    report.add("time per token", rows(done), "the median of the streams' means")
    report.save(json_file)


if __name__ == "__main__":
    typer.run(main)
