"""Harm to deployments without replicas, and to a collective."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from actors.deployment import Deployment
from tests.e2e.conftest import running
from tests.e2e.harm import Control, disturbed, harm_to, kill, pid_of, undisturbed

pytestmark = pytest.mark.cluster

STREAMS, TOKENS = range(16), 100


def test_without_replicas_requests_wait_until_the_experts_are_back():
    with running("attention.actors=2", "experts.actors=4", "transport.deadline_s=1") as deployment:
        control = Control(deployment.grpc_address)
        undisturbed_ones = undisturbed(deployment.grpc_address, STREAMS, TOKENS)
        pid = control.actors()["expert-1"].pid
        disturbed(deployment.grpc_address, harm_to(control, "expert-1"), undisturbed_ones)
        control.until_whole({"expert-1": pid})


@pytest.fixture(scope="module")
def collective() -> Iterator[Deployment]:
    with running("transport.kind=all_to_all", "experts.actors=3", "experts.replicas=2") as found:
        yield found


@pytest.fixture(scope="module")
def expected(collective: Deployment) -> dict[int, list[int]]:
    return undisturbed(collective.grpc_address, STREAMS, TOKENS)


def test_a_collective_forms_anew(collective, expected):
    control = Control(collective.grpc_address)
    for victim in ("expert-1", "attention-1"):
        pid = control.actors()[victim].pid
        disturbed(collective.grpc_address, harm_to(control, victim), expected)
        control.until_whole({victim: pid})


def test_a_collective_finds_another_meeting_place(collective, expected):
    control = Control(collective.grpc_address)
    before = {name: actor.pid for name, actor in control.actors().items()}
    met = pid_of("Rendezvous")
    assert met is not None
    disturbed(collective.grpc_address, lambda: kill(met), expected)
    deadline = time.monotonic() + 60
    while pid_of("Rendezvous") in (None, met):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    # The next group, which a death calls for, forms there.
    disturbed(collective.grpc_address, harm_to(control, "expert-2"), expected)
    control.until_whole({"expert-2": before["expert-2"]})
    after = {name: actor.pid for name, actor in control.actors().items()}
    assert {name for name, pid in after.items() if pid != before[name]} == {"expert-2"}
