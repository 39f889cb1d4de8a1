"""What counts as a stream's pause after a kill."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from bench.failover import longest_pause, row
from bench.load import Ask


class Stumbling:
    """Tokens come every ten milliseconds, but for one that is late once `stumble` has been called."""

    def __init__(self) -> None:
        self._late = False

    def stumble(self) -> None:
        self._late = True

    async def stream(self, ask: Ask) -> AsyncIterator[int]:
        for _ in range(ask.max_tokens):
            late, self._late = self._late, False
            await asyncio.sleep(0.3 if late else 0.01)
            yield 1

    async def close(self) -> None:
        pass


def test_the_pause_that_harm_makes_is_found():
    client, asks = Stumbling(), [Ask(0.0, [1], 20) for _ in range(3)]
    longest, usual = asyncio.run(longest_pause(client, asks, client.stumble))
    assert 0.3 <= longest < 3 and usual < longest
    calm, _ = asyncio.run(longest_pause(client, asks, lambda: None))
    assert calm < longest


def test_row():
    found = row("killed", [(0.1, 0.01), (0.3, 0.03), (0.2, 0.02)])
    assert found == {
        "": "killed",
        "rounds": 3,
        "longest pause ms, median": pytest.approx(200.0),
        "worst": pytest.approx(300.0),
        "median pause ms": pytest.approx(20.0),
    }
