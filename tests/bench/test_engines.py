"""The measured engines are the real ones, and what is counted of them is right."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from bench.distributed_engine import DistributedEngine, Roles, Transport, hidden_share
from bench.local_engine import LocalEngine, Shape, single_process
from bench.stopwatch import stopwatch
from llama4.decoder import Decoder

SHAPE = Shape(max_batch_tokens=64, max_running=8, kv_tokens=1024)


@pytest.fixture
def engine(mini: Path) -> Iterator[LocalEngine]:
    made = single_process(mini, SHAPE)
    yield made
    made.close()


def test_only_steps_of_the_whole_batch_are_timed(engine: LocalEngine) -> None:
    run = engine.decode(batch=5, context=30, steps=6)
    assert len(run.seconds) == 6 and min(run.seconds) > 0
    # 5 rows over 4 experts in each of 4 layers.
    assert 4 <= run.parts["experts_hit"] <= 16
    assert 0 < run.parts["plan"] < run.parts["decoder"]
    assert run.parts["decoder"] + run.parts["head"] + run.parts["sample"] < run.mean
    assert engine.decode(batch=1, context=30, steps=3).parts["experts_hit"] == 4


def test_prefills_are_timed_without_the_first(engine: LocalEngine) -> None:
    assert len(engine.prefill(tokens=50, repeats=3)) == 3


def test_the_originals_are_back_afterwards(mini: Path) -> None:
    before = Decoder.__call__, Decoder.logits
    single_process(mini, SHAPE).close()
    assert (Decoder.__call__, Decoder.logits) == before


def test_a_stopwatch_adds_up_calls() -> None:
    class Worker:
        def work(self, seconds: float) -> str:
            time.sleep(seconds)
            return "done"

    with stopwatch() as watch:
        watch.time(Worker, "work", "time")
        watch.count(Worker, "work", "asked", lambda self, seconds: seconds)
        assert [Worker().work(0.02), Worker().work(0.03)] == ["done", "done"]
        assert watch.totals["asked"] == pytest.approx(0.05)
        assert 0.05 <= watch.totals["time"] < 0.2
    Worker().work(0)
    assert watch.totals["asked"] == pytest.approx(0.05)


@pytest.mark.cluster
@pytest.mark.parametrize("transport", ["p2p", "gloo"])
def test_the_distributed_engine_decodes(mini: Path, transport: Transport) -> None:
    with closing(DistributedEngine(mini, SHAPE, Roles(1, 1), transport)) as engine:
        runs = [engine.decode(batch, context=20, steps=4) for batch in (1, 3)]
    assert [(run.batch, len(run.seconds)) for run in runs] == [(1, 4), (3, 4)]
    assert all(run.parts["combine"] > 0 and run.parts["dispatch"] > 0 for run in runs)
    assert all(0 < hidden_share(run) < 1 for run in runs)
