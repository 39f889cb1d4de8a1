"""The controller: places the actors, starts them in order, and knows how they are. Off every request's way.

Start order: placement groups, rendezvous, actors; every actor loads its slice; all join the epoch's group; one token
goes through all layers. Only then is the deployment ready.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.attention import AttentionActor, AttentionReport
from actors.expert import ExpertActor, ExpertReport
from actors.member import Epoch
from actors.rendezvous import Rendezvous
from actors.status import ActorStatus, ClusterStatus
from cluster.config import DeploymentConfig, RoleConfig
from cluster.launch import release, reserve
from cluster.placement import bundles, plan_experts
from dispatch.groups import World
from engine.request import FinishReason, Request, SamplingParams
from llama4.config import TextConfig

log = logging.getLogger("herder")

NAME = "controller"
_REPORT_TIMEOUT_S = 5.0
_LEAVE_TIMEOUT_S = 10.0


@ray.remote(num_cpus=0)
class Controller:
    """One for each deployment, under the name `controller` in Herder's Ray namespace."""

    def __init__(self, config: DeploymentConfig) -> None:
        logging.basicConfig(level=config.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
        self._config = config
        text_config = TextConfig.from_dir(config.model.path, router_scores=config.model.router_scores)
        self._expert_map = plan_experts(config, text_config.num_local_experts, text_config.moe_layers)
        self._placement_groups: list[PlacementGroup] = []
        self._rendezvous: ActorHandle | None = None
        self._attention: dict[str, ActorHandle] = {}
        self._experts: dict[str, ActorHandle] = {}
        self._phase = "starting"
        self._fault: asyncio.Future[str] = asyncio.get_event_loop().create_future()
        self._watchers: list[asyncio.Task[None]] = []

    # ---- start and stop

    async def start(self) -> None:
        """Brings the deployment up to readiness. Raises what went wrong; `stop` cleans up then as well."""
        roles = bundles(self._config)
        self._phase = "waiting for room in the cluster"
        timeout_s = self._config.placement_timeout_s
        for role in ("attention", "experts"):
            self._placement_groups.append(await asyncio.to_thread(reserve, role, roles[role], timeout_s))
        self._phase = "starting actors"
        attention_group, expert_group = self._placement_groups
        self._rendezvous = Rendezvous.options(name="rendezvous", lifetime="detached").remote()
        self._attention = self._create("attention", AttentionActor, self._config.attention, attention_group)
        self._experts = self._create("expert", ExpertActor, self._config.experts, expert_group)
        self._phase = "loading weights"
        await _all(
            *(actor.load.remote() for actor in self._attention.values()),
            *(actor.load.remote(self._expert_map) for actor in self._experts.values()),
        )
        self._phase = "forming the group"
        host, port = await self._rendezvous.address.remote()
        world = World(tuple(range(len(self._attention))), tuple(range(len(self._experts))))
        await _all(*(actor.join.remote(Epoch(self._expert_map, world, host, port)) for actor in self._members()))
        self._watchers = [
            asyncio.create_task(self._watch(name, actor))
            for name, actor in (*self._attention.items(), *self._experts.items())
        ]
        self._phase = "sending a token through all layers"
        await _all(*(self._probe(actor) for actor in self._attention.values()))
        self._phase = "ready"
        log.info("ready actors=%d epoch=%d", len(self._attention) + len(self._experts), self._expert_map.epoch)

    def _create(self, kind: str, actor_class: Any, role: RoleConfig, group: PlacementGroup) -> dict[str, ActorHandle]:
        return {
            f"{kind}-{number}": actor_class.options(
                name=f"{kind}-{number}",
                lifetime="detached",
                num_cpus=role.num_cpus,
                num_gpus=role.num_gpus,
                resources=role.resources,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number),
            ).remote(number, self._config)
            for number in range(role.actors)
        }

    async def drain(self) -> int:
        """Stops admission at every engine, for good; returns how many accepted requests have not ended.

        May be called again, to follow. From the first call on the deployment is not ready.
        """
        if self._phase == "ready":
            self._phase = "draining"
            log.info("draining")
        remaining = await asyncio.gather(
            *(_within(actor.drain.remote(), _REPORT_TIMEOUT_S) for actor in self._attention.values())
        )
        return sum(left for left in remaining if left is not None)  # an engine that is dead has none

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

    async def _watch(self, name: str, actor: ActorHandle) -> None:
        """Notes the first member whose loop ends: the group cannot go on without it."""
        try:
            await actor.until_ended.remote()
            why = "left"
        except Exception as error:
            why = str(getattr(error, "cause", None) or error).strip().splitlines()[0]
        if self._phase in ("ready", "draining") and not self._fault.done():
            log.error("member lost actor=%s reason=%s", name, why)
            self._fault.set_result(f"{name}: {why}")

    async def stop(self) -> None:
        """Ends the epoch, then the actors, then their reservations."""
        self._phase = "stopping"
        for watcher in self._watchers:
            watcher.cancel()
        members = self._members()
        if self._watchers:
            # All leave at the same step once one of them asks to.
            ended = [actor.until_ended.remote() for actor in members]
            members[0].leave.remote()
            await asyncio.wait([asyncio.ensure_future(_quiet(ref)) for ref in ended], timeout=_LEAVE_TIMEOUT_S)
        for actor in members if self._rendezvous is None else [*members, self._rendezvous]:
            ray.kill(actor)
        for group in self._placement_groups:
            release(group)

    # ---- questions

    async def progress(self) -> tuple[str, dict[str, tuple[int, int]]]:
        """The phase of the start, and for each actor that answers its bytes loaded and in all."""
        named = {**self._attention, **self._experts}
        answers = await asyncio.gather(
            *(_within(actor.progress.remote(), _REPORT_TIMEOUT_S) for actor in named.values())
        )
        return self._phase, {name: answer for name, answer in zip(named, answers, strict=True) if answer is not None}

    async def engines(self) -> dict[str, ActorHandle]:
        """The attention actors by name."""
        return dict(self._attention)

    async def until_fault(self) -> str:
        """Returns once the deployment cannot serve any more, with the reason."""
        return await asyncio.shield(self._fault)

    async def status(self) -> ClusterStatus:
        """The whole deployment; an actor that does not answer in time is listed as such."""
        attention = await _reports(self._attention)
        experts = await _reports(self._experts)
        layers = self._expert_map.layers
        rows = [report.rows for report in experts.values() if isinstance(report, ExpertReport)]
        silent = [name for name, report in (*attention.items(), *experts.items()) if report is None]
        reason = self._reason(silent)
        return ClusterStatus(
            ready=not reason,
            reason=reason,
            epoch=self._expert_map.epoch,
            actors=(
                *(
                    _status(name, "attention", number, report)
                    for number, (name, report) in enumerate(attention.items())
                ),
                *(_status(name, "expert", number, report) for number, (name, report) in enumerate(experts.items())),
            ),
            engines={
                name: report.load
                for name, report in attention.items()
                if isinstance(report, AttentionReport) and report.load is not None
            },
            expert_tokens={
                layer: tuple(sum(counts) for counts in zip(*(row[layer] for row in rows if layer in row), strict=True))
                for layer in layers
            },
            placement={layer: self._expert_map.slots[layer] for layer in layers},
        )

    def _reason(self, silent: list[str]) -> str:
        if self._fault.done():
            return self._fault.result()
        if self._phase != "ready":
            return self._phase
        return f"no answer from {', '.join(silent)}" if silent else ""

    def _members(self) -> list[ActorHandle]:
        return [*self._attention.values(), *self._experts.values()]

    def __repr__(self) -> str:
        return f"controller({self._config.model.served_name}, epoch {self._expert_map.epoch}, {self._phase})"


async def _all(*waiting: Awaitable[object]) -> None:
    """Waits for all; the first failure ends the waiting."""
    await asyncio.gather(*waiting)


async def _quiet(ref: Awaitable[object]) -> None:
    try:
        await ref
    except Exception as error:
        log.debug("ended with %s", error)


async def _within(ref: Awaitable[Any], seconds: float) -> Any:
    """The answer, or None when it does not come or its actor is dead."""
    try:
        return await asyncio.wait_for(ref, seconds)
    except Exception:
        return None


async def _reports(actors: dict[str, ActorHandle]) -> dict[str, AttentionReport | ExpertReport | None]:
    answers = await asyncio.gather(*(_within(actor.report.remote(), _REPORT_TIMEOUT_S) for actor in actors.values()))
    return dict(zip(actors, answers, strict=True))


def _status(name: str, kind: Any, number: int, report: AttentionReport | ExpertReport | None) -> ActorStatus:
    return ActorStatus(name, kind, number, state="no answer") if report is None else report.status
