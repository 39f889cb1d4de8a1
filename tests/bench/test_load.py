from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bench.clients import AskFailed
from bench.common import percentile
from bench.load import Ask, Lengths, Timing, asks_from_file, latencies, random_asks, summary
from bench.serve import run

LENGTHS = Lengths(prompt_low=3, prompt_high=9, answer_low=2, answer_high=5)


def test_a_seed_gives_the_same_requests_at_the_same_times() -> None:
    asks = random_asks(200, 10.0, LENGTHS, vocabulary=50, seed=4)
    assert asks == random_asks(200, 10.0, LENGTHS, vocabulary=50, seed=4)
    assert asks != random_asks(200, 10.0, LENGTHS, vocabulary=50, seed=5)
    assert {len(ask.prompt) for ask in asks} == set(range(3, 10)) and {ask.max_tokens for ask in asks} == {2, 3, 4, 5}
    assert max(token for ask in asks for token in ask.prompt if isinstance(token, int)) < 50


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    times = [ask.at for ask in random_asks(4000, 10.0, LENGTHS, vocabulary=50, seed=1)]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.1, rel=0.05)
    assert (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 == pytest.approx(0.1, rel=0.1)
    assert {ask.at for ask in random_asks(10, None, LENGTHS, vocabulary=50, seed=1)} == {0.0}


def test_prompts_from_a_file_go_round(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "hello"}\n{"prompt": [1, 2], "max_tokens": 7}\n')
    asks = asks_from_file(file, 3, None, max_tokens=5, seed=0)
    assert [(ask.prompt, ask.max_tokens) for ask in asks] == [("hello", 5), ([1, 2], 7), ("hello", 5)]
    file.write_text('{"prompt": "hello"}\n{"text": "x"}\n')
    with pytest.raises(ValueError, match=r"prompts.jsonl:2 must be a JSON object with a prompt"):
        asks_from_file(file, 3, None, max_tokens=5, seed=0)


def test_goodput_counts_what_kept_both_objectives() -> None:
    timings = [
        Timing(first=0.1, last=1.1, tokens=11),
        Timing(first=0.5, last=1.5, tokens=11),
        Timing(first=0.1, last=3.1, tokens=11),
        Timing(first=0.1, last=0.1, tokens=1),
        Timing(first=None, last=0.1, tokens=0, error="refused"),
    ]
    found = summary(timings, elapsed=2.0, slo_first=0.2, slo_per_token=0.1001)
    assert found["goodput requests/s"] == 1.0 and found["within SLO %"] == 40.0
    assert found["errors"] == 1 and found["requests/s"] == 2.0 and found["tokens/s"] == 17.0
    rows = {row["ms"]: row for row in latencies(timings)}
    assert rows["per output token"]["p50"] == pytest.approx(100.0)
    assert rows["first token"]["p90"] == pytest.approx(380.0)


def test_percentiles_are_interpolated() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([1.0, 2.0], 99) == pytest.approx(1.99)
    assert percentile([], 50) != percentile([], 50)


class SlowServer:
    """Answers one request at a time, a token every 20 ms; refuses prompts that begin with 0."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self.closed = False

    async def stream(self, ask: Ask) -> AsyncIterator[int]:
        if ask.prompt[0] == 0:
            raise AskFailed("refused")
        async with self._lock:
            for _ in range(ask.max_tokens):
                await asyncio.sleep(0.02)
                yield 1

    async def close(self) -> None:
        self.closed = True


async def test_waiting_behind_others_counts_from_when_the_request_was_due() -> None:
    server = SlowServer()
    timings, elapsed = await run(server, [Ask(0.0, [1], 5), Ask(0.05, [1], 5), Ask(0.0, [0], 5)])
    first, second, refused = timings
    assert first.first is not None and second.first is not None
    assert 0.015 < first.first < 0.05 and second.first > 0.06
    assert first.tokens == 5 and first.per_token == pytest.approx(0.02, rel=0.5)
    assert refused.error == "refused" and refused.first is None
    assert elapsed >= 0.2 and server.closed
