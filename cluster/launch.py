"""Ray's side of placement: reach or start a cluster, and reserve what a deployment's actors need."""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from cluster.config import DeploymentConfig
from cluster.placement import RoleBundles, bundles
from cluster.ray_environment import RAY_ENVIRONMENT, SHARED_CORES

log = logging.getLogger("herder")

NAMESPACE = "herder"
CONTROLLER = "controller"  # the controller's name there
AT_HEAD = {"node:__internal_head__": 0.001}  # what only the head's node has
_START_ATTEMPTS = 3
_START_PAUSE_S = 2.0
ENVIRONMENT = {
    # torch's store looks its peers up in DNS at every connection; without an answer, each would take five seconds.
    "RES_OPTIONS": "timeout:1 attempts:1",
    # A dead peer is an error to deal with, not an end of the process.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
}


class PlacementError(RuntimeError):
    """The cluster has no room for a role's actors."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A living node of a Ray cluster: its address, what it offers by name, and whether this process runs on it."""

    address: str
    resources: dict[str, float]
    here: bool

    @property
    def offers(self) -> str:
        """Its resources for a human being, without those that Ray adds to each node."""
        return ", ".join(
            f"{amount:g} {name}"
            for name, amount in sorted(self.resources.items())
            if ":" not in name and "memory" not in name
        )


def machines() -> list[Machine]:
    """The machines of the Ray cluster that this one is part of."""
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(address="auto", namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    try:
        own_id = ray.get_runtime_context().get_node_id()
        return [
            Machine(node["NodeManagerAddress"], node["Resources"], node["NodeID"] == own_id)
            for node in ray.nodes()  # type: ignore[no-untyped-call]
            if node["Alive"]
        ]
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, handler)  # Ray has replaced it


def own_address() -> str:
    """The address under which other machines reach this one, as far as routes tell."""
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address


def connect(config: DeploymentConfig, address: str | None) -> Path | None:
    """Joins the Ray cluster at `address`, or starts one on this machine that ends with this process.

    Returns the folder of the session, with its logs and sockets, if it was started here.
    """
    environment = dict(RAY_ENVIRONMENT)
    if address is None and shares_cores(config, os.cpu_count() or 1):
        environment |= SHARED_CORES
    for key, value in environment.items():
        os.environ.setdefault(key, value)
    num_cpus = None
    if address is None:
        # A machine of our own holds whatever the configuration asks for, even if its actors then share cores.
        asked = sum(bundle.get("CPU", 0.0) for role in bundles(config).values() for bundle in role.bundles)
        asked += config.vision.max_replicas * config.vision.num_cpus
        num_cpus = max(os.cpu_count() or 1, math.ceil(asked))
    options: dict[str, Any] = {
        "address": address or "local",
        "num_cpus": num_cpus,
        "include_dashboard": True if address is None else None,
        "namespace": NAMESPACE,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    if address is not None:
        ray.init(**options, runtime_env={"env_vars": ENVIRONMENT})
        return None
    # Ray's processes inherit it. Workers that Ray starts in advance could not serve a job with a runtime_env.
    os.environ.update(ENVIRONMENT)
    return _start_local(options)


def shares_cores(config: DeploymentConfig, cores: int) -> bool:
    """Whether the actors' threads outnumber the cores of the one machine that they all run on."""
    roles = (config.attention, config.experts)
    return sum(role.actors * role.compute_threads for role in roles if role.device == "cpu") > cores


def _start_local(options: dict[str, Any]) -> Path:
    """A node of our own; returns its session's folder. It may fail for a moment's reason, so it is tried again.

    Ray gives it a fixed 30 s, which a busy machine may exceed, and the dashboard's port may be that of a node which is
    just ending.
    """
    for attempt in range(1, _START_ATTEMPTS):
        try:
            return _init(options)
        except Exception as error:
            if ray.is_initialized():
                raise
            log.warning("Ray did not start, trying again attempt=%d reason=%s", attempt, error)
            _end_children_of_ray()
            time.sleep(_START_PAUSE_S)
    return _init(options)


def _init(options: dict[str, Any]) -> Path:
    context: Any = ray.init(**options)
    return Path(context.address_info["session_dir"])


def remove_session(folder: Path) -> None:
    """Removes what a Ray that has ended left of its session: logs, sockets, and the link that calls it the latest."""
    latest = folder.parent / "session_latest"
    with suppress(OSError):
        if latest.readlink() == folder:
            latest.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _end_children_of_ray() -> None:
    """Ray leaves the processes of a node that did not come up; they would go on beside the next."""
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if any(f"{os.sep}ray{os.sep}" in word for word in child.cmdline()):
                child.kill()


def reserve(name: str, role: RoleBundles, timeout_s: float) -> PlacementGroup:
    """A placement group for one role's actors, in rank or slot order. Raises PlacementError when it cannot be had."""
    group: PlacementGroup = placement_group(
        [dict(bundle) for bundle in role.bundles],
        strategy=role.strategy,
        name=f"{NAMESPACE}-{name}",
        lifetime="detached",
    )
    if not group.wait(timeout_s):
        release(group)
        available: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        free = {name: amount for name, amount in available.items() if ":" not in name}
        raise PlacementError(
            f"{name}.actors: no room for {len(role.bundles)} actors of {role.bundles[0]} each ({role.strategy}) within "
            f"placement_timeout_s ({timeout_s:g}); the cluster has {free} free"
        )
    return group


def release(group: PlacementGroup) -> None:
    """Gives the reservation back."""
    remove_placement_group(group)
