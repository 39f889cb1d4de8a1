"""A live deployment grows, shrinks, moves experts and evens out its load while streams run: same tokens, no error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import grpc
import psutil
import pytest

from actors.deployment import Deployment
from herder.v1 import control_pb2
from tests import niceness
from tests.e2e.conftest import logged, running
from tests.e2e.harm import Control, disturbed, undisturbed

pytestmark = pytest.mark.cluster

STREAMS = range(64)
TOKENS = 120


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    with running("attention.actors=1", "experts.actors=2") as found:
        yield found


@pytest.fixture(scope="module")
def control(deployment: Deployment) -> Control:
    return Control(deployment.grpc_address)


@pytest.fixture(scope="module")
def expected(deployment: Deployment) -> dict[int, list[int]]:
    return undisturbed(deployment.grpc_address, STREAMS, TOKENS)


def placement(control: Control) -> dict[int, list[tuple[int, ...]]]:
    found = control.stub.GetExpertPlacement(control_pb2.GetExpertPlacementRequest(), timeout=60)
    return {layer.layer: [tuple(expert.slots) for expert in layer.experts] for layer in found.layers}


def slots(control: Control) -> set[int]:
    return {slot for experts in placement(control).values() for holders in experts for slot in holders}


@pytest.mark.skipif(sys.platform != "linux", reason="niceness is a thread's own on Linux")
def test_what_serves_comes_before_what_does_not(control):
    processes = {name: psutil.Process(actor.pid) for name, actor in control.actors().items()}
    usual = processes["attention-0"].nice()
    behind = min(usual + 5, 19)
    assert processes["controller"].nice() == behind
    expert = processes["expert-0"]
    assert expert.nice() == behind  # its main thread, which is Ray's
    assert usual in niceness.of_threads(expert)
    # What brings tokens away, and what computes the next ones.
    assert {usual, min(usual + 3, 19)} <= niceness.of_threads(processes["attention-0"])
    dashboard = next(child for child in psutil.Process().children() if "/dashboard.py" in str(child.cmdline()))
    assert dashboard.nice() == min(psutil.Process().nice() + 10, 19)


def lost_slots() -> list[str]:
    """What attention actors have said of slots that they lost."""
    return [line for line in logged() if " lost slot=" in line]


def test_expert_actors_grow_and_shrink(deployment, control, expected):
    def scale() -> float:
        at = time.monotonic()
        for actors in (4, 3):
            control.stub.ScaleExperts(control_pb2.ScaleExpertsRequest(actors=actors), timeout=120)
            assert slots(control) == set(range(actors))
        return at

    disturbed(deployment.grpc_address, scale, expected)
    assert {name for name in control.actors() if name.startswith("expert")} == {"expert-0", "expert-1", "expert-2"}
    assert not lost_slots()  # one that ends on purpose is none


def test_experts_move(deployment, control, expected):
    before = placement(control)
    there = before[min(before)][5][0]
    other = next(slot for slot in sorted(slots(control)) if slot != there)

    def move() -> float:
        at = time.monotonic()
        control.stub.MoveExpert(control_pb2.MoveExpertRequest(expert=5, to_slot=other), timeout=120)
        return at

    disturbed(deployment.grpc_address, move, expected)
    assert all(other in experts[5] for experts in placement(control).values())
    with pytest.raises(grpc.RpcError) as caught:
        control.stub.MoveExpert(control_pb2.MoveExpertRequest(expert=5, to_slot=77), timeout=60)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT and "77" in caught.value.details()


def test_a_slot_is_drained(deployment, control, expected):
    def drain() -> float:
        at = time.monotonic()
        control.stub.DrainSlot(control_pb2.DrainSlotRequest(slot=1), timeout=120)
        return at

    disturbed(deployment.grpc_address, drain, expected)
    assert slots(control) == {0, 2}
    assert "expert-1" not in control.actors()
    assert not lost_slots()


def test_a_change_goes_on_without_who_asked_for_it(control):
    change = control.stub.ScaleAttention.future(control_pb2.ScaleAttentionRequest(actors=2))
    time.sleep(0.5)  # the new actor's process starts
    assert change.cancel()
    deadline = time.monotonic() + 60
    while "attention-1" not in control.actors():
        assert time.monotonic() < deadline, control.info()
        time.sleep(0.2)
    control.stub.ScaleAttention(control_pb2.ScaleAttentionRequest(actors=1), timeout=60)
    assert "attention-1" not in control.actors()


def test_attention_actors_grow_and_shrink(deployment, control, expected):
    def scale() -> float:
        at = time.monotonic()
        for actors in (2, 1):
            control.stub.ScaleAttention(control_pb2.ScaleAttentionRequest(actors=actors), timeout=120)
        return at

    disturbed(deployment.grpc_address, scale, expected)
    assert [name for name in control.actors() if name.startswith("attention")] == ["attention-0"]
    with pytest.raises(grpc.RpcError) as caught:
        control.stub.ScaleAttention(control_pb2.ScaleAttentionRequest(actors=0), timeout=60)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT and "actors" in caught.value.details()
