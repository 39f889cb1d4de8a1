"""Micro-batches change no token; the faster number is found by trial, and found again when it changes."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from dispatch.expert_map import ExpertMap
from dispatch.topology import Topology
from engine.micro_batching import MicroBatching
from llama4.weights import Checkpoint, load_experts
from tests.dispatch.p2p_world import SECRET, Attention, Servers
from tests.engine.test_failover import make_requests, run
from tests.single import SingleProcess


class Machine:
    """Steps that take what the test says."""

    def __init__(self, wanted: Literal["auto", 1, 2]) -> None:
        self.now = 0.0
        self.seconds = {1: 1.0, 2: 1.0}
        self.batching = MicroBatching(wanted, clock=lambda: self.now)

    def steps(self, number: int, rows: int = 20, sequences: int = 20) -> Counter[int]:
        """How often each number of micro-batches was chosen."""
        return Counter(self.batching.run(rows, sequences, self._compute) for _ in range(number))

    def _compute(self, micro_batches: int) -> int:
        self.now += self.seconds[micro_batches]
        return micro_batches


@pytest.mark.parametrize("faster", [1, 2])
def test_the_faster_way_is_kept_and_tried_again(faster: Literal[1, 2]) -> None:
    machine = Machine("auto")
    machine.seconds[faster] = 0.9
    assert machine.steps(16) == {1: 8, 2: 8}
    assert machine.steps(1000) == {faster: 1000}
    machine.seconds[faster] = 1.1
    assert machine.steps(16) == {1: 8, 2: 8}
    assert machine.steps(1000) == {3 - faster: 1000}


def test_a_few_slow_steps_decide_nothing() -> None:
    machine = Machine("auto")
    machine.seconds[2] = 0.9
    machine.steps(10)
    machine.now, machine.seconds[2] = 0.0, 100.0  # an expert actor has died
    machine.steps(2)
    machine.seconds[2] = 0.9
    machine.steps(4)
    assert machine.steps(10) == {2: 10}


def test_sizes_and_kinds_of_steps_are_judged_apart() -> None:
    machine = Machine("auto")
    machine.seconds[2] = 0.9
    machine.steps(16)
    machine.seconds[2] = 1.1
    for rows, sequences in ((4, 4), (20, 4)):
        machine.steps(16, rows, sequences)
        assert machine.steps(10, rows, sequences) == {1: 10}
    assert machine.steps(10) == {2: 10}


def test_what_is_asked_for_is_done_unless_there_is_one_sequence() -> None:
    assert Machine(1).steps(9) == {1: 9} and Machine(2).steps(9) == {2: 9}
    assert Machine(2).steps(3, rows=50, sequences=1) == Machine("auto").steps(3, sequences=0, rows=0) == {1: 3}


@pytest.mark.parametrize("lanes_on", [None, torch.device("cpu")], ids=["sockets", "lanes"])
def test_two_over_p2p_give_what_one_process_gives(
    checkpoint: Path, engine: SingleProcess, lanes_on: torch.device | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.dispatch.p2p_world.lanes_on", lanes_on)
    config = engine.config
    layers = {layer: tuple((e % 2,) for e in range(config.num_local_experts)) for layer in config.moe_layers}
    expert_map = ExpertMap(1, layers)
    servers, rank = Servers(), Attention(0, width=config.hidden_size)
    for slot in (0, 1):
        experts = load_experts(Checkpoint(checkpoint), config, expert_map.experts_of(slot), torch.float32, "cpu")
        servers.start(slot, expert_map, experts, width=config.hidden_size)
    rank.adopt(Topology(expert_map, {slot: servers[slot].address for slot in (0, 1)}, SECRET))
    cut = SingleProcess(
        checkpoint, page_size=4, max_batch_tokens=24, gate=rank.gate, wrap=lambda _: rank.dispatcher, micro_batches=2
    )
    requests = make_requests(random.Random(1))
    try:
        found = run(cut, requests)
    finally:
        cut.close()
        rank.close()
        counted = servers.counted()
    again = "whole" if lanes_on is None else "whole-again"
    expected = run(engine, [replace(request, request_id=f"{request.request_id}-{again}") for request in requests])
    for name, answer in found.items():
        answer.check(expected[f"{name}-{again}"])
    # The requests are decoded together nearly all of the time, in two messages a layer to each slot that is hit.
    steps = cut.engine.load().steps
    assert all(stats.requests > 1.2 * steps * len(config.moe_layers) for stats in counted.values())
