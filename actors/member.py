"""What attention and expert actors have in common: load a slice, join an epoch, run a loop on a thread.

The loop's thread does all computing and all collectives; the actor's event loop only answers calls.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import psutil
import ray
import torch

from actors.status import ActorStatus
from cluster.config import DeploymentConfig, RoleConfig
from dispatch.expert_map import ExpertMap
from dispatch.groups import EpochGroup, World
from dispatch.store import StoreClients, connect_store

log = logging.getLogger("herder")


@dataclass(frozen=True, slots=True)
class Epoch:
    """What a member must know to join: who takes part, where the experts are, and where the members meet."""

    expert_map: ExpertMap
    world: World
    store_host: str
    store_port: int


class Member:
    """One actor's progress, device, group and loop thread.

    `number` is the attention actor's rank or the expert actor's slot.
    """

    def __init__(
        self, kind: Literal["attention", "expert"], number: int, role: RoleConfig, config: DeploymentConfig
    ) -> None:
        logging.basicConfig(level=config.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
        torch.set_num_threads(role.compute_threads)
        self.kind: Literal["attention", "expert"] = kind
        self.number = number
        self.name = f"{kind}-{number}"
        self.config = config
        self.device = torch.device(role.device)
        self.state = "starting"
        self.loaded = (0, 0)  # bytes done, bytes in all
        self._stores: dict[tuple[str, int], StoreClients] = {}
        self._ended: concurrent.futures.Future[None] = concurrent.futures.Future()

    def on_progress(self, done: int, total: int) -> None:
        self.loaded = (done, total)

    async def load(self, work: Callable[[], None]) -> None:
        """Runs `work` beside the event loop, so that progress can be asked for meanwhile."""
        self.state = "loading"
        await asyncio.to_thread(work)
        self.state = "loaded"
        log.info("%s loaded bytes=%d device=%s", self.name, self.loaded[0], self.device)

    async def form_group(self, epoch: Epoch) -> EpochGroup:
        """Meets all other members of the epoch; returns when they are there."""
        world = epoch.world
        rank = world.attention_rank(self.number) if self.kind == "attention" else world.slot_rank(self.number)
        timeout_s = self.config.transport.timeout_s
        meeting_place = (epoch.store_host, epoch.store_port)

        def form() -> EpochGroup:
            if meeting_place not in self._stores:
                self._stores[meeting_place] = connect_store(*meeting_place, timeout_s)
            return EpochGroup.form(
                epoch.expert_map.epoch,
                world,
                rank,
                self._stores[meeting_place],
                address=ray.util.get_node_ip_address(),
                timeout_s=timeout_s,
                device=self.device,
            )

        self.state = "joining"
        return await asyncio.to_thread(form)

    def start(self, loop: Callable[[], None]) -> None:
        """Runs the loop on a thread of its own; `until_ended` tells its end."""

        def body() -> None:
            try:
                loop()
            except BaseException as error:
                self.state = f"failed: {error}"
                log.exception("%s failed", self.name)
                self._ended.set_exception(error)
            else:
                self.state = "left"
                self._ended.set_result(None)

        self.state = "serving"
        threading.Thread(target=body, name=self.name, daemon=True).start()

    async def until_ended(self) -> None:
        """Returns when the loop has left its epoch; raises what ended it otherwise."""
        await asyncio.wrap_future(self._ended)

    def status(self) -> ActorStatus:
        return ActorStatus(
            name=self.name,
            role=self.kind,
            rank_or_slot=self.number,
            node_id=ray.get_runtime_context().get_node_id(),
            node_ip=ray.util.get_node_ip_address(),
            pid=os.getpid(),
            state=self.state,
            device=str(self.device),
            loaded_bytes=self.loaded[0],
            rss_bytes=psutil.Process().memory_info().rss,
        )
