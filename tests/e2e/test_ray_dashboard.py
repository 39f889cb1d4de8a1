"""Ray's dashboard, asked as its own pages ask it, says of each actor its role and rank, and in what state it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import ray
from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

from actors.deployment import Deployment
from tests.e2e.harm import Control

pytestmark = pytest.mark.cluster

WAIT_S = 60.0  # an actor looks at its state once a second, and Ray sends it on as often


@pytest.fixture(scope="module")
def dashboard(tiny: Deployment) -> Iterator[httpx.Client]:
    url = f"http://{ray._private.worker.global_worker.node.webui_url}"
    with httpx.Client(base_url=url, headers=get_auth_headers_if_auth_enabled({}), timeout=60) as client:
        yield client


def asked(dashboard: httpx.Client, path: str, **params: object) -> Any:
    answer = dashboard.get(path, params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def actors(dashboard: httpx.Client) -> dict[str, tuple[str, str]]:
    """Repr and id of the actors that live and are not Serve's own, by what their name begins with."""
    found = asked(dashboard, "/logical/actors")["actors"].values()
    return {
        actor["name"].split("@")[0]: (actor["reprName"], actor["actorId"])
        for actor in found
        if actor["state"] == "ALIVE" and not actor["name"].startswith("SERVE_")
    }


def present_states(dashboard: httpx.Client, actor_id: str) -> list[str]:
    """The names of the calls of `in_state` that the actor's page lists as running."""
    of_actor = {"filter_keys": "actor_id", "filter_predicates": "=", "filter_values": actor_id}
    calls = asked(dashboard, "/api/v0/tasks", **of_actor, detail=1, limit=1000)["result"]["result"]
    running = [call for call in calls if call["state"] == "RUNNING"]
    return [call["name"] for call in running if call["func_or_class_name"].endswith(".in_state")]


def test_every_actor_is_shown_with_role_rank_and_state(tiny: Deployment, dashboard: httpx.Client) -> None:
    control = Control(tiny.grpc_address)
    found = actors(dashboard)
    assert {name: shown for name, (shown, _) in found.items()} == {
        "controller": "controller(tiny)",
        "attention-0": "attention(rank 0, cpu)",
        "attention-1": "attention(rank 1, cpu)",
        "expert-0": "expert(slot 0, cpu)",
        "expert-1": "expert(slot 1, cpu)",
    }
    deadline = time.monotonic() + WAIT_S
    for name, (_, actor_id) in found.items():
        # The epoch may pass meanwhile: on a busy machine an actor is given up for a moment.
        while (states := present_states(dashboard, actor_id)) != [in_words(name, control.info().epoch)]:
            assert time.monotonic() < deadline, (name, states)
            time.sleep(0.2)


def in_words(name: str, epoch: int) -> str:
    """The state of an actor of the plain deployment when all is well."""
    if name == "controller":
        return f"controller: ready, epoch {epoch}"
    held = {"expert-0": ", experts 0-7 in 3 layers", "expert-1": ", experts 8-15 in 3 layers"}.get(name, "")
    return f"{name}: serving, epoch {epoch}{held}"
