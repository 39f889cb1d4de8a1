"""The places of a deployment's actors, and who sits in them. Actors are detached: they outlive the controller.

A seat is a bundle of a placement group; it stays when its actor dies, and the next one sits down there. Actors' names
in Ray are `<role>-<number>@<incarnation>`, so that a successor never waits for its predecessor's name.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import psutil
import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, get_placement_group, placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from actors.attention import AttentionActor
from actors.expert import ExpertActor
from actors.reports import AttentionReport, ExpertReport
from cluster.config import DeploymentConfig, RoleConfig
from cluster.launch import NAMESPACE, release, reserve
from cluster.placement import RoleBundles, bundles
from dispatch.topology import SlotAddress

log = logging.getLogger("herder")

Role = Literal["attention", "expert"]


@dataclass(eq=False, slots=True)
class Seat:
    """A place for an actor: `number` is an attention actor's rank or an expert actor's slot.

    `serving`: its actor takes part. `held`: layer → experts whose weights an expert actor has. `address`: where it
    serves, with the p2p transport. `node_id` and `pid` are known once the actor has reported.
    """

    role: Role
    number: int
    group: PlacementGroup
    bundle: int
    incarnation: str = ""
    actor: ActorHandle | None = None
    serving: bool = False
    held: dict[int, tuple[int, ...]] = field(default_factory=dict)
    address: SlotAddress | None = None
    node_id: str = ""
    pid: int = 0

    @property
    def name(self) -> str:
        return f"{self.role}-{self.number}"

    @property
    def handle(self) -> ActorHandle:
        """The actor. It must have been created."""
        assert self.actor is not None, f"{self.name} has no actor"
        return self.actor

    def note(self, report: AttentionReport | ExpertReport) -> None:
        """Takes over what the actor says of itself."""
        self.incarnation = report.incarnation
        self.node_id, self.pid = report.status.node_id, report.status.pid
        if isinstance(report, ExpertReport):
            self.held, self.address = dict(report.held), report.address


def role_config(config: DeploymentConfig, role: Role) -> RoleConfig:
    """The configuration's section of a role."""
    return config.attention if role == "attention" else config.experts


async def reserve_first(config: DeploymentConfig, role: Role) -> list[Seat]:
    """A role's seats at the start of a deployment, in one placement group. Raises PlacementError."""
    key = _group_key(role)
    group = await asyncio.to_thread(reserve, key, bundles(config)[key], config.placement_timeout_s)
    return [Seat(role, number, group, number) for number in range(role_config(config, role).actors)]


async def nodes_of(seats: Sequence[Seat]) -> dict[int, str]:
    """The node that each seat is on, by number; the seats are of one placement group."""
    table = await asyncio.to_thread(placement_group_table, seats[0].group)
    bundle_nodes = table["bundles_to_node_id"]
    return {seat.number: bundle_nodes[seat.bundle] for seat in seats}


async def reserve_more(config: DeploymentConfig, role: Role, numbers: Sequence[int]) -> list[Seat]:
    """Further seats, each with a placement group of its own. Raises PlacementError, and then keeps none."""
    whole = bundles(config)[_group_key(role)]
    one = RoleBundles(whole.bundles[:1], "PACK")
    seats: list[Seat] = []
    try:
        for number in numbers:
            name = f"{role}-{number}"
            group = await asyncio.to_thread(reserve, name, one, config.placement_timeout_s)
            seats.append(Seat(role, number, group, 0))
    except BaseException:
        for seat in seats:
            release(seat.group)
        raise
    return seats


async def find_seat(role: Role, number: int) -> Seat | None:
    """The seat that was reserved for this number, by its placement group's name."""
    return await asyncio.to_thread(_find_seat, role, number)


def _find_seat(role: Role, number: int) -> Seat | None:
    for name, bundle in ((f"{role}-{number}", 0), (_group_key(role), number)):
        with suppress(ValueError):
            group = get_placement_group(f"{NAMESPACE}-{name}")
            if bundle < group.bundle_count:
                return Seat(role, number, group, bundle)
    return None


def find_actors(role: Role) -> dict[int, list[ActorHandle]]:
    """Every living actor of a role by its number. There are several of one number while one replaces another."""
    found: dict[int, list[ActorHandle]] = {}
    for entry in ray.util.list_named_actors(all_namespaces=True):
        kind, dash, rest = entry["name"].partition("-")
        number, at, _ = rest.partition("@")
        if entry["namespace"] == NAMESPACE and kind == role and dash and at and number.isdigit():
            with suppress(ValueError):  # it has died meanwhile
                found.setdefault(int(number), []).append(ray.get_actor(entry["name"], namespace=NAMESPACE))
    return found


def sit(seat: Seat, config: DeploymentConfig) -> None:
    """Creates a new actor in this seat, the name of whose life is random."""
    role = role_config(config, seat.role)
    actor_class = AttentionActor if seat.role == "attention" else ExpertActor
    seat.incarnation = uuid.uuid4().hex
    seat.serving, seat.held, seat.address, seat.node_id, seat.pid = False, {}, None, "", 0
    seat.actor = actor_class.options(
        name=f"{seat.name}@{seat.incarnation[:8]}",
        namespace=NAMESPACE,
        lifetime="detached",
        num_cpus=role.num_cpus,
        num_gpus=role.num_gpus,
        resources=role.resources,
        scheduling_strategy=PlacementGroupSchedulingStrategy(seat.group, placement_group_bundle_index=seat.bundle),
    ).remote(seat.number, seat.incarnation, config)


def empty(seat: Seat) -> None:
    """Ends the seat's actor for certain: one that is stopped or stuck does not hear Ray."""
    actor, node_id, pid = seat.actor, seat.node_id, seat.pid
    seat.actor, seat.serving, seat.address, seat.held = None, False, None, {}
    if actor is None:
        return
    ray.kill(actor)
    if not pid:
        return
    if node_id == ray.get_runtime_context().get_node_id():
        kill_process(pid)
    else:
        affinity = NodeAffinitySchedulingStrategy(node_id, soft=False)
        _kill_there.options(scheduling_strategy=affinity).remote(pid)


def give_up(seat: Seat) -> None:
    """Ends the seat's actor, and gives the room back if it is this seat's alone."""
    empty(seat)
    if seat.group.bundle_count == 1:
        release(seat.group)


def release_all(seats: Sequence[Seat]) -> None:
    """Gives all the room back, that of the first seats as well, whether or not any of these is still in use."""
    groups = {seat.group.id: seat.group for seat in seats}
    for key in ("attention", "experts"):
        with suppress(ValueError):
            group = get_placement_group(f"{NAMESPACE}-{key}")
            groups[group.id] = group
    for group in groups.values():
        release(group)


def kill_process(pid: int) -> None:
    """SIGKILL for one of Ray's workers, if it is still there."""
    with suppress(psutil.Error, ProcessLookupError):
        if any("ray::" in word for word in psutil.Process(pid).cmdline()):  # its number may have gone to another
            os.kill(pid, signal.SIGKILL)


@ray.remote(num_cpus=0, max_retries=0)
def _kill_there(pid: int) -> None:
    kill_process(pid)


def _group_key(role: Role) -> str:
    return "attention" if role == "attention" else "experts"
