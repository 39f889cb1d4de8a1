"""Harm done to a live deployment while streams run: every answer comes, and every token is the undisturbed run's.

Only what clients are connected to cannot die unnoticed: then they ask again, and nothing is left of what they had.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator

import psutil
import pytest
import ray

from actors.attention import _SILENT_GATEWAY_S
from actors.deployment import Deployment
from actors.seats import find_actors
from dispatch.faults import Fault
from tests.e2e.conftest import running
from tests.e2e.harm import Census, Control, disturbed, harm_to, kill, pid_of, undisturbed
from tests.e2e.streams import Stream, run_streams

pytestmark = pytest.mark.cluster

STREAMS = range(100)
TOKENS = 100
DEADLINE_S = 1.0
KILLS = int(os.environ.get("HERDER_KILLS", "4"))  # of the test that looks for leaks
SETTINGS = ("attention.actors=2", "experts.actors=4", f"transport.deadline_s={DEADLINE_S}")


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    with running(*SETTINGS, "experts.replicas=2") as found:
        yield found


@pytest.fixture(scope="module")
def control(deployment: Deployment) -> Control:
    return Control(deployment.grpc_address)


@pytest.fixture(scope="module")
def expected(deployment: Deployment) -> dict[int, list[int]]:
    return undisturbed(deployment.grpc_address, STREAMS, TOKENS)


def test_an_expert_actor_is_killed(deployment, control, expected):
    pid = control.actors()["expert-1"].pid
    gap_s, _ = disturbed(deployment.grpc_address, harm_to(control, "expert-1"), expected)
    assert gap_s < 2
    control.until_whole({"expert-1": pid})


def test_an_expert_actor_stops_without_dying(deployment, control, expected):
    pid = control.actors()["expert-2"].pid
    gap_s, _ = disturbed(deployment.grpc_address, harm_to(control, "expert-2", signal.SIGSTOP), expected)
    assert gap_s < DEADLINE_S + 2
    control.until_whole({"expert-2": pid})
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_an_attention_actor_is_killed(deployment, control, expected):
    pid = control.actors()["attention-0"].pid
    gap_s, _ = disturbed(deployment.grpc_address, harm_to(control, "attention-0"), expected)
    assert gap_s < 10
    control.until_whole({"attention-0": pid})


def test_the_controller_is_killed(deployment, control, expected):
    before = {name: actor.pid for name, actor in control.actors().items()}
    disturbed(deployment.grpc_address, harm_to(control, "controller"), expected)
    control.until_whole({"controller": before["controller"]})
    after = {name: actor.pid for name, actor in control.actors().items()}
    assert {name: pid for name, pid in after.items() if before[name] != pid}.keys() == {"controller"}
    # It knows its deployment again: it still repairs it.
    disturbed(deployment.grpc_address, harm_to(control, "expert-0"), expected)
    control.until_whole({"expert-0": before["expert-0"]})


def test_two_in_a_row(deployment, control, expected):
    pids = {name: control.actors()[name].pid for name in ("expert-0", "expert-3")}

    def harm() -> float:
        control.hurt("expert-0")
        control.until_whole({"expert-0": pids["expert-0"]})
        return control.hurt("expert-3")

    disturbed(deployment.grpc_address, harm, expected)
    control.until_whole(pids)


def test_messages_are_dropped_and_late(deployment, control, expected):
    """On the links of all six actors, both ways."""
    before = control.info()
    script = (
        Fault("drop", "attention", 0, times=2),
        Fault("delay", "attention", 1, seconds=0.02, times=20),
        Fault("drop", "expert", 1, times=2),
        *(Fault("delay", "expert", slot, seconds=0.02, times=20) for slot in (0, 2, 3)),
    )
    members = [actor for role in ("attention", "expert") for found in find_actors(role).values() for actor in found]

    def harm() -> float:
        assert all(ray.get([member.go_wrong.remote(script) for member in members]))
        return time.monotonic()

    disturbed(deployment.grpc_address, harm, expected)
    control.until_whole()
    after = control.info()
    assert {actor.pid for actor in after.actors} == {actor.pid for actor in before.actors}  # nobody was ended for it
    assert after.epoch > before.epoch  # though the links were given up


def test_the_gateway_stands_still_for_a_while(deployment, control, expected):
    """Longer than engines, slowed down meanwhile, keep the requests of a gateway that they do not hear."""
    pid = pid_of("ServeReplica:herder:gateway")
    assert pid is not None
    silence_s = 1.3 * _SILENT_GATEWAY_S
    engines = find_actors("attention")
    slow = [Fault("delay", "attention", rank, seconds=0.5, times=round(2 * silence_s)) for rank in engines]

    def harm() -> float:
        ray.get([member.go_wrong.remote(slow) for found in engines.values() for member in found])
        kill(pid, signal.SIGSTOP)
        try:
            time.sleep(silence_s)
        finally:
            kill(pid, signal.SIGCONT)
        return time.monotonic()

    disturbed(deployment.grpc_address, harm, {number: expected[number] for number in STREAMS[:16]})


@pytest.mark.timeout(300 + 20 * KILLS)
def test_deaths_leave_nothing_behind(deployment, control, expected):
    few = {number: expected[number] for number in STREAMS[:16]}
    before = Census.take(control)
    victims = ("expert-0", "expert-1", "attention-0", "expert-2", "expert-3")
    for number in range(KILLS):
        victim = victims[number % len(victims)]
        pid = control.actors()[victim].pid
        disturbed(deployment.grpc_address, harm_to(control, victim), few)
        control.until_whole({victim: pid})
    deadline = time.monotonic() + 30
    while grown := growth(before, Census.take(control)):
        assert time.monotonic() < deadline, grown
        time.sleep(1)


def growth(before: Census, after: Census) -> list[str]:
    """What has become more; of survivors, what each death could have added to them."""
    grown = [
        f"{name}: {getattr(before, name)}, then {getattr(after, name)}"
        for name in ("roles", "named_actors", "placement_groups", "kv_pages", "sockets")
        if getattr(after, name) != getattr(before, name)
    ]
    if after.processes > before.processes + 3:  # Ray's idle ones come and go
        grown.append(f"processes: {before.processes}, then {after.processes}")
    for pid in before.open_files.keys() & after.open_files.keys():
        files, then = before.open_files[pid], after.open_files[pid]
        if then >= files + KILLS:
            grown.append(f"open files of {pid}: {files}, then {then}")
        if after.rss_bytes[pid] > before.rss_bytes[pid] + (32 << 20):
            grown.append(f"bytes of {pid}: {before.rss_bytes[pid]}, then {after.rss_bytes[pid]}")
    return grown


@pytest.mark.parametrize("kind", ["ServeReplica:herder:gateway", "ProxyActor"])
def test_what_clients_are_connected_to_is_killed(deployment, control, expected, kind):
    pid = pid_of(kind)
    assert pid is not None
    before = {name: actor.pid for name, actor in control.actors().items()}
    streams: dict[int, Stream] = {}

    async def cut_off() -> None:
        asking = asyncio.create_task(run_streams(deployment.grpc_address, STREAMS[:20], 3000, streams))
        # So few that the gateway has hardly had the time to see which proxies live.
        while sum(len(stream.tokens) for stream in streams.values()) < 40:
            await asyncio.sleep(0.02)
        os.kill(pid, signal.SIGKILL)
        await asyncio.wait_for(asking, 60)

    asyncio.run(cut_off())
    assert all(stream.error for stream in streams.values())  # and none hangs
    control.until_whole()
    assert {name: actor.pid for name, actor in control.actors().items()} == before
    # Engines end what nobody hears any more.
    deadline = time.monotonic() + 30
    while sum(engine.running + engine.waiting for engine in control.engines()):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert undisturbed(deployment.grpc_address, STREAMS, TOKENS) == expected
