"""What counts as a stream's pause while something changes."""

from __future__ import annotations

import asyncio
import time

import pytest

from bench.elastic import pauses_during, row
from bench.load import Ask
from tests.bench.test_failover import Stumbling


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.elastic._WARM_S", 0.05)
    monkeypatch.setattr("bench.elastic._BEHIND_S", 0.4)


def test_the_pause_that_a_change_makes_is_found() -> None:
    client = Stumbling()

    def change() -> None:
        client.stumble()
        time.sleep(0.05)

    pauses, took = asyncio.run(pauses_during(client, [Ask(0.0, [1], 1000)] * 3, change))
    assert 0.05 <= took < 3 and sum(pause >= 0.3 for pause in pauses) == 1


def test_answers_that_are_too_short_are_told() -> None:
    with pytest.raises(RuntimeError, match="2 of 2 answers ended before"):
        asyncio.run(pauses_during(Stumbling(), [Ask(0.0, [1], 3)] * 2, lambda: time.sleep(0.05)))


def test_row() -> None:
    assert row("scaled", [0.1, 0.1, 0.3], 5.0) == {
        "": "scaled",
        "took s": 5.0,
        "median pause ms": pytest.approx(100.0),
        "longest pause ms": pytest.approx(300.0),
        "longest / median": pytest.approx(3.0),
    }
