"""What attention and expert actors have in common: load weights, run a loop on a thread, tell how they are.

The loop's thread does all computing and all transport; the actor's event loop only answers calls.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal

import psutil
import ray
from ray.actor import ActorHandle

from actors.garbage import keep_all_there_is
from actors.giving_way import giving_way, threads, threads_give_way, tokens_come_first
from actors.logs import set_up_logs
from actors.status import ActorStatus
from cluster.config import DeploymentConfig, RoleConfig
from cluster.launch import CONTROLLER, NAMESPACE
from dispatch.epoch import Epoch

if TYPE_CHECKING:
    from dispatch.groups import EpochGroup
    from dispatch.store import StoreClients

log = logging.getLogger("herder")


class Member:
    """One actor's progress, device and loop thread.

    `number` is the attention actor's rank or the expert actor's slot; `incarnation` is this process's name among all
    that have had or will have this number.
    """

    def __init__(
        self,
        kind: Literal["attention", "expert"],
        number: int,
        incarnation: str,
        role: RoleConfig,
        config: DeploymentConfig,
    ) -> None:
        import torch  # here, as in all that the controller imports too: it takes seconds

        set_up_logs(config.log_level, config.log_format)
        torch.set_num_threads(role.compute_threads)
        self.kind: Literal["attention", "expert"] = kind
        self.number = number
        self.incarnation = incarnation
        self.name = f"{kind}-{number}"
        self.config = config
        self.device = torch.device(role.device)
        self.lanes_on = self.device if self.device.type == "cuda" else None  # for rows of the p2p transport
        self.node_ip = ray.util.get_node_ip_address()
        self.state = "starting"
        self.loaded = (0, 0)  # bytes done, bytes in all
        self._events: asyncio.AbstractEventLoop | None = None
        self._controller: ActorHandle | None = None
        self._stores: dict[tuple[str, int], StoreClients] = {}
        self._ended: concurrent.futures.Future[None] = concurrent.futures.Future()

    def on_progress(self, done: int, total: int) -> None:
        self.loaded = (done, total)

    async def load(self, work: Callable[[], None]) -> None:
        """Runs `work` beside the event loop, so that progress can be asked for meanwhile."""
        self.state = "loading"
        self._events = asyncio.get_running_loop()
        # Before there is anything to tell it: coming to know its class takes some 25 ms of CPU.
        self._controller = await asyncio.to_thread(giving_way, partial(ray.get_actor, CONTROLLER, NAMESPACE))
        await asyncio.to_thread(giving_way, work)
        self.state = "loaded"
        log.info("%s loaded bytes=%d device=%s", self.name, self.loaded[0], self.device)

    def form_group(self, epoch: Epoch) -> EpochGroup:
        """Meets all other members of the epoch; on the loop's thread. Raises GroupBroken."""
        from dispatch.groups import EpochGroup
        from dispatch.store import connect_store

        world = epoch.world
        rank = world.attention_rank(self.number) if self.kind == "attention" else world.slot_rank(self.number)
        timeout_s = self.config.transport.timeout_s
        meeting_place = (epoch.store_host, epoch.store_port)
        if meeting_place not in self._stores:
            self._stores[meeting_place] = connect_store(*meeting_place, timeout_s)
        return EpochGroup.form(
            epoch.expert_map.epoch,
            world,
            rank,
            self._stores[meeting_place],
            address=self.node_ip,
            timeout_s=timeout_s,
            device=self.device,
        )

    def start(self, loop: Callable[[], None]) -> None:
        """Runs the loop on a thread of its own; `until_ended` tells its end.

        An expert actor's other threads, which are Ray's, give way from then on: no row passes through them. When the
        process is killed, it falls to them to give its memory back: some 15 ms of CPU.
        """
        from llama4.openmp import bind_threads

        def body() -> None:
            try:
                if self.device.type == "cpu":
                    if self.kind == "attention":
                        tokens_come_first()  # and with it the threads that the next line begins
                    bind_threads(self.number if self.kind == "expert" else -1 - self.number)
                loop()
            except BaseException as error:
                self.state = f"failed: {error}"
                log.exception("%s failed", self.name)
                self._ended.set_exception(error)
            else:
                self.state = "left"
                self._ended.set_result(None)

        keep_all_there_is()
        self.state = "serving"
        others = threads()
        threading.Thread(target=body, name=self.name, daemon=True).start()
        if self.kind == "expert":
            threads_give_way(others)

    async def until_ended(self) -> None:
        """Returns when the loop has been told to end; raises what ended it otherwise."""
        await asyncio.wrap_future(self._ended)

    def tell_group_broken(self, reason: str) -> None:
        """Lets the controller know, from the loop's thread, without waiting."""
        log.warning("%s group broken reason=%s", self.name, reason)
        self._tell(lambda controller: controller.group_broken.remote(self.name, reason))

    def tell_slot_lost(self, slot: int, incarnation: str, reason: str) -> None:
        """Lets the controller know, from the loop's thread, without waiting."""
        log.warning("%s lost slot=%d incarnation=%s reason=%s", self.name, slot, incarnation, reason)
        self._tell(lambda controller: controller.slot_lost.remote(slot, incarnation, reason))

    def _tell(self, call: Callable[[ActorHandle], object]) -> None:
        assert self._events is not None and self._controller is not None, "load comes first"
        # While it is away this leads to nothing; when it comes back, it asks everybody.
        self._events.call_soon_threadsafe(call, self._controller)

    def status(self) -> ActorStatus:
        return ActorStatus(
            name=self.name,
            role=self.kind,
            rank_or_slot=self.number,
            node_id=ray.get_runtime_context().get_node_id(),
            node_ip=self.node_ip,
            pid=os.getpid(),
            state=self.state,
            device=str(self.device),
            loaded_bytes=self.loaded[0],
            rss_bytes=psutil.Process().memory_info().rss,
        )
