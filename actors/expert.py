"""An expert actor: one slot, the weights of some experts of every MoE layer, and no other state."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import ray
from numpy.typing import NDArray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from actors.dashboard import StateShown, call_in_state, held_in_words
from actors.giving_way import giving_way, import_giving_way
from actors.logs import set_level
from actors.member import Member, log
from actors.ray_metrics import RayMetrics, report_regularly, report_rows
from actors.reports import ExpertReport
from cluster.config import DeploymentConfig
from cluster.live import LiveSettings
from dispatch.epoch import Epoch
from dispatch.faults import Fault, Faults
from dispatch.topology import SlotAddress
from llama4.config import TextConfig

if TYPE_CHECKING:
    import torch

    from dispatch.collective import CollectiveServer
    from dispatch.expert_server import ExpertServer
    from llama4.moe import Experts

Held = Mapping[int, Sequence[int]]  # layer → experts
Weights = tuple[NDArray[np.uint8], NDArray[np.uint8]]  # gate_up and down, as bytes


@ray.remote
class ExpertActor:
    def __init__(self, slot: int, incarnation: str, config: DeploymentConfig) -> None:
        import_giving_way("dispatch.collective", "dispatch.expert_server", "llama4.weights")
        from llama4.precision import choose_dtype

        self._slot = slot
        self._member = Member("expert", slot, incarnation, config.experts, config)
        self._text_config = TextConfig.from_dir(config.model.path, router_scores=config.model.router_scores)
        self._dtype = choose_dtype(self._member.device, config.model.dtype)
        self._experts = self._empty({})
        self._p2p: ExpertServer | None = None  # serves, or the next one does, as the transport is
        self._collective: CollectiveServer | None = None
        self._epoch: int | None = None  # the newest that it was told
        self._shown = StateShown(self._state, call_in_state)
        self._metrics = RayMetrics()
        self._reporter: asyncio.Task[None] | None = None

    def _empty(self, held: Held) -> Experts:
        from llama4.moe import Experts

        return Experts(self._text_config, held, self._dtype, self._member.device)

    # ---- weights

    async def load(self, held: Held) -> None:
        """Reads the experts that are not here yet from the checkpoint, and nothing else; raises CheckpointError."""
        missing = self._missing(held)
        if missing:
            await self._member.load(lambda: self._experts.take(self._read(missing)))
        if self._p2p is not None or self._collective is not None:
            self._member.state = "serving"

    async def fetch(self, held: Held, peers: Mapping[tuple[int, int], ActorHandle]) -> None:
        """As `load`, but an expert's weights come from the peer named for (layer, expert), if that one gives them."""
        for layer, experts in self._missing(held).items():
            for expert in experts:
                found = await self._ask(peers.get((layer, expert)), layer, expert)
                if found is None:
                    await self.load({layer: (expert,)})
                else:
                    await asyncio.to_thread(giving_way, functools.partial(self._put, layer, expert, found))

    async def _ask(self, peer: ActorHandle | None, layer: int, expert: int) -> Weights | None:
        if peer is None:
            return None
        try:
            found: Weights | None = await peer.export.remote(layer, expert)
        except RayError as error:
            log.info("%s: no weights from a peer layer=%d expert=%d reason=%s", self._member.name, layer, expert, error)
            return None
        return found

    def _missing(self, held: Held) -> dict[int, tuple[int, ...]]:
        here = self._experts.held
        missing = {layer: tuple(e for e in experts if e not in here.get(layer, ())) for layer, experts in held.items()}
        return {layer: experts for layer, experts in missing.items() if experts}

    def _read(self, held: Held) -> Experts:
        from llama4.weights import Checkpoint, load_experts

        return load_experts(
            Checkpoint(self._member.config.model.path),
            self._text_config,
            held,
            dtype=self._dtype,
            device=self._member.device,
            on_progress=self._member.on_progress,
        )

    async def export(self, layer: int, expert: int) -> Weights | None:
        """An expert's weights as bytes, for a peer; None when they are not here."""
        if expert not in self._experts.held.get(layer, ()):
            return None
        gate_up, down = self._experts.part(layer, expert)
        return _bytes_of(gate_up), _bytes_of(down)

    def _put(self, layer: int, expert: int, parts: Weights) -> None:
        import torch

        arrived = self._empty({layer: (expert,)})
        for target, array in zip(arrived.part(layer, expert), parts, strict=True):
            # What comes out of Ray's object store is read-only and shared.
            target.copy_(torch.from_numpy(array.copy()).view(self._dtype).view(target.shape))
        self._experts.take(arrived)

    async def drop(self, held: Held) -> None:
        """Forgets what is not in `held`. No epoch that is in use may send rows for it."""
        for layer, experts in self._experts.held.items():
            for expert in experts:
                if expert not in held.get(layer, ()):
                    self._experts.drop(layer, expert)

    # ---- serving

    async def serve(self, secret: bytes) -> SlotAddress | None:
        """Begins to serve; gives the address to send rows to, if the transport has addresses."""
        from dispatch.collective import CollectiveServer
        from dispatch.expert_server import ExpertServer

        member, width = self._member, self._text_config.hidden_size
        self._reporter = asyncio.create_task(report_regularly(self._report_metrics))
        if member.config.transport_kind == "p2p":
            server = ExpertServer(
                self._experts, self._slot, width, self._dtype, secret, member.node_ip, lanes_on=member.lanes_on
            )
            self._p2p = server
            member.start(server.run)
            return server.address
        collective = CollectiveServer(
            self._slot, self._experts, width, self._dtype, member.form_group, member.tell_group_broken
        )
        self._collective = collective
        member.start(collective.run)
        return None

    async def allow(self, held: Held, min_epoch: int) -> None:
        """p2p: rows for these experts are served, from this epoch on; others are refused."""
        assert self._p2p is not None, "serve comes first, with the p2p transport"
        self._epoch = min_epoch
        self._p2p.allow({layer: tuple(experts) for layer, experts in held.items()}, min_epoch)

    async def adopt(self, epoch: Epoch) -> None:
        """Collective transport: enters this epoch; returns when its group is formed. Raises GroupBroken."""
        assert self._collective is not None, "serve comes first, with the collective transport"
        self._epoch = epoch.expert_map.epoch
        await asyncio.wrap_future(self._collective.adopt(epoch))

    async def reconfigure(self, live: LiveSettings) -> None:
        """Takes over what may change while it serves."""
        set_level(live.log_level)

    async def go_wrong(self, script: Sequence[Fault]) -> bool:
        """For drills: lets these befall its answers, instead of what was asked for before.

        Returns False with collectives, which have no messages of their own.
        """
        if self._p2p is None:
            return False
        self._p2p.faults = Faults(script, "expert", self._slot)
        return True

    async def leave(self) -> None:
        """Stops serving."""
        if self._collective is not None:
            self._collective.close()
        elif self._p2p is not None:
            self._p2p.stop()

    async def until_ended(self) -> None:
        await self._member.until_ended()

    async def progress(self) -> tuple[int, int]:
        """Bytes loaded, bytes in all."""
        return self._member.loaded

    async def report(self) -> ExpertReport:
        return ExpertReport(
            self._member.status(),
            self._member.incarnation,
            self._rows(),
            self._experts.held,
            None if self._p2p is None else self._p2p.address,
        )

    def _report_metrics(self) -> None:
        report_rows(self._metrics, self._slot, self._rows(), self._experts.held)

    def _rows(self) -> dict[int, tuple[int, ...]]:
        num_experts = self._text_config.num_local_experts
        if self._p2p is not None:
            counts = {layer: dict(rows) for layer, rows in self._p2p.stats.rows.items()}
            return {layer: tuple(rows.get(e, 0) for e in range(num_experts)) for layer, rows in counts.items()}
        if self._collective is None or self._collective.stats is None:
            return {}
        return {layer: tuple(rows_E.tolist()) for layer, rows_E in self._collective.stats.rows_E.items()}

    # ---- for Ray's dashboard

    def _state(self) -> str:
        epoch = "no epoch yet" if self._epoch is None else f"epoch {self._epoch}"
        return f"{self._member.name}: {self._member.state}, {epoch}, {held_in_words(self._experts.held)}"

    async def in_state(self, words: str) -> None:
        """Lasts as long as the state does: see actors/dashboard.py."""
        await self._shown.until_not(words)

    def __repr__(self) -> str:
        return f"expert(slot {self._slot}, {self._member.device})"


def _bytes_of(tensor: torch.Tensor) -> NDArray[np.uint8]:
    import torch

    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
