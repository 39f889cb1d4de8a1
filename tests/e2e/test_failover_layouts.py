"""Harm to deployments without replicas, and to a collective."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import running
from tests.e2e.harm import Control, disturbed, harm_to, undisturbed

pytestmark = pytest.mark.cluster

TOKENS = 100


def test_without_replicas_requests_wait_until_the_experts_are_back():
    with running("attention.actors=2", "experts.actors=4", "transport.deadline_s=1") as deployment:
        control = Control(deployment.grpc_address)
        expected = undisturbed(deployment.grpc_address, range(16), TOKENS)
        pid = control.actors()["expert-1"].pid
        disturbed(deployment.grpc_address, harm_to(control, "expert-1"), expected)
        control.until_whole({"expert-1": pid})


def test_a_collective_forms_anew():
    with running("transport.kind=all_to_all", "experts.actors=3", "experts.replicas=2") as deployment:
        control = Control(deployment.grpc_address)
        expected = undisturbed(deployment.grpc_address, range(16), TOKENS)
        for victim in ("expert-1", "attention-1"):
            pid = control.actors()[victim].pid
            disturbed(deployment.grpc_address, harm_to(control, victim), expected)
            control.until_whole({victim: pid})
