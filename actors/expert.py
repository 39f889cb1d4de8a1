"""An expert actor: one slot, the weights of some experts of every MoE layer, and no other state."""

from __future__ import annotations

from dataclasses import dataclass

import ray

from actors.member import Epoch, Member
from actors.status import ActorStatus
from cluster.config import DeploymentConfig
from dispatch.all_to_all import DispatchStats, ExpertRank
from dispatch.expert_map import ExpertMap
from dispatch.groups import EpochGroup
from dispatch.lockstep import Lockstep
from llama4.config import TextConfig
from llama4.moe import Experts
from llama4.precision import choose_dtype
from llama4.weights import Checkpoint, load_experts


@dataclass(frozen=True, slots=True)
class ExpertReport:
    """An expert actor's state, and the rows it has computed: layer → a number for each logical expert."""

    status: ActorStatus
    rows: dict[int, tuple[int, ...]]


@ray.remote
class ExpertActor:
    def __init__(self, slot: int, config: DeploymentConfig) -> None:
        self._slot = slot
        self._member = Member("expert", slot, config.experts, config)
        self._dtype = choose_dtype(self._member.device, config.model.dtype)
        self._held = 0
        self._width = 0
        self._experts: Experts | None = None
        self._lockstep: Lockstep | None = None
        self._stats: DispatchStats | None = None
        self._leaving = False

    async def load(self, expert_map: ExpertMap) -> None:
        """Reads the experts that the map gives to this slot, and nothing else; raises CheckpointError."""
        await self._member.load(lambda: self._load(expert_map))

    def _load(self, expert_map: ExpertMap) -> None:
        model = self._member.config.model
        text_config = TextConfig.from_dir(model.path, router_scores=model.router_scores)
        held = expert_map.experts_of(self._slot)
        self._width = text_config.hidden_size
        self._experts = load_experts(
            Checkpoint(model.path),
            text_config,
            held,
            dtype=self._dtype,
            device=self._member.device,
            on_progress=self._member.on_progress,
        )
        self._held = sum(len(experts) for experts in held.values())

    async def join(self, epoch: Epoch) -> None:
        """Forms the epoch's group with all members and begins to serve."""
        assert self._experts is not None, "load comes first"
        group = await self._member.form_group(epoch)
        lockstep = Lockstep(group)
        rank = ExpertRank(group, epoch.expert_map, self._slot, self._experts, self._width, self._dtype)
        self._lockstep, self._stats = lockstep, rank.stats
        self._member.start(lambda: self._serve(group, lockstep, rank))

    def _serve(self, group: EpochGroup, lockstep: Lockstep, rank: ExpertRank) -> None:
        try:
            while not (header := lockstep.begin(0, self._leaving)).leaving:
                if header.idle:
                    lockstep.wait()
                else:
                    rank.serve_step()
        finally:
            group.close()

    async def leave(self) -> None:
        """Ends the epoch for all members."""
        self._leaving = True
        if self._lockstep is not None:
            self._lockstep.ring()

    async def until_ended(self) -> None:
        await self._member.until_ended()

    async def progress(self) -> tuple[int, int]:
        """Bytes loaded, bytes in all."""
        return self._member.loaded

    async def report(self) -> ExpertReport:
        rows = {} if self._stats is None else self._stats.rows_E
        return ExpertReport(self._member.status(), {layer: tuple(counts.tolist()) for layer, counts in rows.items()})

    def __repr__(self) -> str:
        return f"expert(slot {self._slot}, {self._held} experts, {self._member.state})"
