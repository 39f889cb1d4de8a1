"""The controller: places the actors, starts them in order, keeps them at full strength. Off every request's way.

Start order: placement groups, actors; every actor loads its slice; all are told the first layout; one token goes
through all layers. Only then is the deployment ready.

It keeps nothing that could not be asked for again: when it dies, Ray starts it anew, and it takes over the actors that
live (`_adopt`). Requests do not notice.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import Awaitable, Collection
from typing import Any

import psutil
import ray
from ray.actor import ActorHandle

from actors.adoption import adopt
from actors.dashboard import StateShown, call_in_state
from actors.elastic import Elastic
from actors.fleet import Fleet
from actors.giving_way import threads, threads_give_way
from actors.logs import set_level, set_up_logs
from actors.ray_metrics import RayMetrics, report_cluster, report_regularly
from actors.repair import Repair
from actors.reports import AttentionReport, ExpertReport
from actors.seats import Seat, nodes_of, reserve_first
from actors.status import ActorStatus, ClusterStatus, EngineHandle
from cluster.config import DeploymentConfig
from cluster.holdings import Holdings
from cluster.launch import CONTROLLER
from cluster.live import LiveSettings
from cluster.placement import Nodes, plan_experts
from engine.request import FinishReason, Request, RequestRejected, SamplingParams
from llama4.config import TextConfig

log = logging.getLogger("herder")

_REPORT_TIMEOUT_S = 5.0
_UNPLACED_TIMEOUT_S = 0.5  # of an actor that may still wait for a node
_LEAVE_TIMEOUT_S = 10.0
_POLL_S = 30.0  # of a gateway that waits for other engines


@ray.remote(num_cpus=0, max_restarts=-1)
class Controller:
    """One for each deployment, under the name `controller` in Herder's Ray namespace."""

    def __init__(self, config: DeploymentConfig) -> None:
        set_up_logs(config.log_level, config.log_format)
        threads_give_way(threads())
        self._config = config
        self._fleet = Fleet(config, self._plan())
        self._repair = Repair(self._fleet)
        self._elastic = Elastic(self._fleet, self._repair)
        self._phase = "starting"
        self._balancing: asyncio.Task[None] | None = None
        self._metrics = RayMetrics()
        self._reporting: asyncio.Task[None] | None = None
        self._adopted: asyncio.Task[None] | None = None
        self._placed: asyncio.Task[None] | None = None
        self._started: asyncio.Task[None] | None = None
        self._shown = StateShown(self._state, call_in_state)
        if ray.get_runtime_context().was_current_actor_reconstructed:
            self._phase = "coming back"
            self._adopted = asyncio.get_event_loop().create_task(self._adopt())

    def _plan(self, nodes: Nodes | None = None) -> Holdings:
        text_config = TextConfig.from_dir(self._config.model.path, router_scores=self._config.model.router_scores)
        return Holdings.of(plan_experts(self._config, text_config.num_local_experts, text_config.moe_layers, nodes))

    # ---- start and stop

    async def start(self) -> None:
        """Brings the deployment up to readiness; whoever calls it again waits for the same.

        Raises what went wrong; `stop` cleans up then as well.
        """
        await self._back()
        if self._adopted is None:
            self._placed = self._placed or asyncio.create_task(self._place())
            self._started = self._started or asyncio.create_task(self._start(self._placed))
            await asyncio.shield(self._started)

    async def placed(self) -> None:
        """After `start` was called: returns when all actors have their room. Raises what kept them from it."""
        if self._placed is not None:
            await asyncio.shield(self._placed)

    async def _place(self) -> None:
        fleet = self._fleet
        self._phase = "waiting for room in the cluster"
        attention = await reserve_first(self._config, "attention")
        fleet.attention = {seat.number: seat for seat in attention}
        experts = await reserve_first(self._config, "expert")
        fleet.experts = {seat.number: seat for seat in experts}
        fleet.holdings = self._plan(await nodes_of(experts))

    async def _start(self, placed: asyncio.Task[None]) -> None:
        await placed
        fleet = self._fleet
        attention, experts = list(fleet.attention.values()), list(fleet.experts.values())
        self._phase = "loading weights"
        await _all(
            *(fleet.bring_up(seat) for seat in attention),
            *(fleet.bring_up(seat, dict(fleet.holdings.slots[seat.number])) for seat in experts),
        )
        self._phase = "telling everybody who holds what"
        await fleet.join([*attention, *experts])
        self._phase = "sending a token through all layers"
        await _all(*(self._probe(seat.handle) for seat in attention))
        self._begin()
        log.info("ready actors=%d epoch=%d", len(attention) + len(experts), fleet.epoch)

    def _begin(self) -> None:
        for seat in self._fleet.seats():
            if seat.serving:
                self._repair.watch(seat)
        self._balancing = asyncio.create_task(self._elastic.run())
        self._reporting = asyncio.create_task(report_regularly(self._report_metrics))
        self._phase = "ready"

    async def _adopt(self) -> None:
        """Takes over from the controller that died."""
        missing = await adopt(self._fleet)
        self._begin()
        log.info("back epoch=%d missing=%s", self._fleet.epoch, [seat.name for seat in missing])
        for seat in missing:
            self._repair.replace(seat)
        if self._fleet.draining:
            self._phase = "draining"

    async def _probe(self, actor: ActorHandle) -> None:
        """One token from prompt to sample: a dispatch and a combine of every MoE layer have then gone through."""
        gateway_id = f"probe-{uuid.uuid4().hex}"
        request = Request(gateway_id, (0,), SamplingParams(max_tokens=1, ignore_eos=True))
        rejection = await actor.submit.remote(request, gateway_id)
        if rejection is not None:
            raise rejection
        async for message in actor.outputs.remote(gateway_id):
            output = (await message)[-1]
            if output.finish_reason is not FinishReason.LENGTH:
                raise RuntimeError(f"the first token did not come through: {output.error}")
            return

    async def drain(self) -> int:
        """Stops admission at every engine, for good; returns how many accepted requests have not ended.

        May be called again, to follow. From the first call on the deployment is not ready.
        """
        await self._back()
        self._fleet.draining = True
        if self._phase == "ready":
            self._phase = "draining"
            log.info("draining")
        remaining = await asyncio.gather(
            *(_within(seat.handle.drain.remote()) for seat in self._fleet.serving(self._fleet.attention).values())
        )
        return sum(left for left in remaining if left is not None)  # an engine that is dead has none

    async def stop(self) -> None:
        """Ends the engines, then the actors, then their reservations."""
        self._phase = "stopping"
        self._repair.stop()
        for task in (self._balancing, self._reporting, self._adopted, self._started):
            if task is not None:
                task.cancel()
        serving = [seat.handle for seat in self._fleet.seats() if seat.serving]
        ended = [asyncio.ensure_future(_within(actor.until_ended.remote(), _LEAVE_TIMEOUT_S)) for actor in serving]
        for actor in serving:
            actor.leave.remote()
        if ended:
            await asyncio.wait(ended)
        await self._fleet.end()

    # ---- changes

    async def reconfigure(self, live: LiveSettings) -> None:
        """Applies what may change while requests run, here and at every actor; those to come are born with it."""
        await self._back()
        if live == LiveSettings.of(self._config):
            return
        self._config = self._fleet.config = live.over(self._config)
        set_level(live.log_level)
        await asyncio.gather(
            *(_within(seat.handle.reconfigure.remote(live)) for seat in self._fleet.seats() if seat.actor is not None)
        )
        log.info("reconfigured %s", live)

    async def scale(self, role: str, actors: int) -> RequestRejected | None:
        """Exactly this many actors of "experts" or "attention"; returns why not, if it cannot be."""
        change = self._elastic.scale_experts if role == "experts" else self._elastic.scale_attention
        return await self._try(change(actors))

    async def move(self, expert: int, to_slot: int, layer: int | None, from_slot: int | None) -> RequestRejected | None:
        """See Elastic.move; returns why not, if it cannot be."""
        return await self._try(self._elastic.move(expert, to_slot, layer, from_slot))

    async def drain_slot(self, slot: int) -> RequestRejected | None:
        """See Elastic.drain_slot; returns why not, if it cannot be."""
        return await self._try(self._elastic.drain_slot(slot))

    async def rebalance(self) -> bool | RequestRejected:
        """See Elastic.rebalance; returns why not, if it cannot be."""
        await self._back()
        try:
            return await self._elastic.rebalance()
        except RequestRejected as rejection:
            return rejection

    async def _try(self, change: Awaitable[None]) -> RequestRejected | None:
        await self._back()
        try:
            await change
        except RequestRejected as rejection:
            return rejection
        return None

    async def _back(self) -> None:
        """After a restart: until it knows the deployment again."""
        if self._adopted is not None:
            await asyncio.shield(self._adopted)

    # ---- what members tell

    async def slot_lost(self, slot: int, incarnation: str, reason: str) -> None:
        """An attention actor has given up a slot's server."""
        if self._phase in ("ready", "draining"):
            await self._repair.slot_lost(slot, incarnation, reason)

    async def group_broken(self, name: str, reason: str) -> None:
        """A member's group is of no use any more."""
        if self._phase in ("ready", "draining"):
            log.warning("group broken actor=%s reason=%s", name, reason)
            await self._repair.group_broken()

    # ---- questions

    async def config(self) -> DeploymentConfig:
        """What it keeps up, under the live settings that it was given."""
        return self._config

    async def progress(self) -> tuple[str, dict[str, tuple[int, int]]]:
        """The phase of the start, and for each actor that answers its bytes loaded and in all."""
        seats = [seat for seat in self._fleet.seats() if seat.actor is not None]
        answers = await asyncio.gather(*(_within(seat.handle.progress.remote()) for seat in seats))
        loaded = {seat.name: answer for seat, answer in zip(seats, answers, strict=True) if answer is not None}
        return self._phase, loaded

    async def watch_engines(self, known: Collection[tuple[str, str]]) -> dict[str, EngineHandle]:
        """The attention actors by name, as soon as they differ from `known` (name, incarnation), or after a while."""
        await self._back()
        return await self._fleet.engines_unlike(known, _POLL_S)

    async def status(self) -> ClusterStatus:
        """The whole deployment; an actor that does not answer in time is listed as such."""
        await self._back()
        fleet, elastic = self._fleet, self._elastic
        seats = [*sorted(fleet.attention.items()), *sorted(fleet.experts.items())]
        reports = await asyncio.gather(*(_report(seat) for _, seat in seats))
        named = {seat.name: report for (_, seat), report in zip(seats, reports, strict=True)}
        attention = [report for report in reports if isinstance(report, AttentionReport)]
        rows = [report.rows for report in reports if isinstance(report, ExpertReport)]
        reason = self._reason()
        return ClusterStatus(
            ready=not reason,
            reason=reason,
            epoch=max(fleet.epoch, 0),
            actors=(self._own_status(), *(_status(seat, named[seat.name]) for _, seat in seats)),
            engines={report.status.name: report.load for report in attention if report.load is not None},
            expert_tokens={
                layer: tuple(sum(counts) for counts in zip(*(row[layer] for row in rows if layer in row), strict=True))
                for layer in fleet.holdings.layers
            },
            placement=dict(fleet.holdings.holders),
            balancedness=self._balancedness(),
            balancedness_before=elastic.balance_before,
            seconds_since_move=elastic.seconds_since_move,
            balance_mode=self._config.balance.mode,
            failovers=fleet.failovers,
        )

    def _report_metrics(self) -> None:
        fleet = self._fleet
        report_cluster(self._metrics, not self._reason(), max(fleet.epoch, 0), fleet.failovers, self._balancedness())

    def _balancedness(self) -> float:
        return 0.0 if self._config.balance.mode == "off" else self._elastic.balance.total

    def _reason(self) -> str:
        """Why a request sent now would not be answered soon; empty when it would."""
        if self._phase != "ready":
            return self._phase
        if not self._fleet.serving(self._fleet.attention):
            return "every attention actor is being replaced"
        if self._fleet.unreachable():
            lost = sorted(set(self._fleet.holdings.slots) - set(self._fleet.serving(self._fleet.experts)))
            return f"some experts have no holder while slots {lost} are being replaced"
        return ""

    def _own_status(self) -> ActorStatus:
        return ActorStatus(
            CONTROLLER,
            "controller",
            0,
            node_id=ray.get_runtime_context().get_node_id(),
            node_ip=ray.util.get_node_ip_address(),
            pid=os.getpid(),
            state=self._phase,
            rss_bytes=psutil.Process().memory_info().rss,
        )

    # ---- for Ray's dashboard

    def _state(self) -> str:
        reason = self._reason()
        return f"{CONTROLLER}: {f'not ready: {reason}' if reason else f'ready, epoch {self._fleet.epoch}'}"

    async def in_state(self, words: str) -> None:
        """Lasts as long as the state does: see actors/dashboard.py."""
        await self._shown.until_not(words)

    def __repr__(self) -> str:
        return f"controller({self._config.model.served_name})"


async def _all(*waiting: Awaitable[object]) -> None:
    """Waits for all; the first failure ends the waiting."""
    await asyncio.gather(*waiting)


async def _within(ref: Awaitable[Any], seconds: float = _REPORT_TIMEOUT_S) -> Any:
    """The answer, or None when it does not come or its actor is dead."""
    try:
        return await asyncio.wait_for(ref, seconds)
    except Exception:
        return None


async def _report(seat: Seat) -> AttentionReport | ExpertReport | None:
    if seat.actor is None:
        return None
    return await _within(seat.handle.report.remote(), _REPORT_TIMEOUT_S if seat.serving else _UNPLACED_TIMEOUT_S)


def _status(seat: Seat, report: AttentionReport | ExpertReport | None) -> ActorStatus:
    if report is None:
        return ActorStatus(
            seat.name, seat.role, seat.number, state="being replaced" if not seat.serving else "no answer"
        )
    return report.status
