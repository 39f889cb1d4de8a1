"""An attention actor: a whole engine on a thread. Gateways reach it by few calls and one stream of outputs each."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from numpy.typing import NDArray

from actors.dashboard import StateShown, call_in_state
from actors.embeddings import to_tensor
from actors.member import Layout, Member, log
from actors.model_info import ModelInfo
from actors.outbox import Outbox
from actors.ray_metrics import RayMetrics, report_engine, report_regularly, report_transport
from actors.status import ActorStatus
from actors.timed_dispatcher import TimedDispatcher
from cluster.config import DeploymentConfig
from cluster.kv_pools import pool_pages
from cluster.live import LiveSettings
from dispatch.all_to_all import DispatchStats
from dispatch.collective import CollectiveGate, Epoch
from dispatch.faults import Fault, Faults
from dispatch.p2p import P2PDispatcher
from dispatch.p2p_gate import P2PGate
from dispatch.topology import Topology
from engine.engine import Engine, StepGate
from engine.grammar import Grammars
from engine.image_spec import ImageSpec
from engine.micro_batching import MicroBatching
from engine.pages import LayerGroup, LayerKind, PageAllocator
from engine.patches import PromptPatches
from engine.request import EngineLoad, ExpertSeconds, Request, RequestOutput, RequestRejected
from engine.scheduler import Limits, Scheduler
from engine.step import Stepper
from engine.timeline import Timelines
from llama4.config import TextConfig
from llama4.decoder import Decoder
from llama4.kv_pages import KVPages
from llama4.moe import Dispatcher
from llama4.precision import choose_dtype
from llama4.weights import Checkpoint, load_decoder

_SILENT_GATEWAY_S = 10.0  # then its requests end: nobody would take their outputs


@dataclass(frozen=True, slots=True)
class AttentionReport:
    """An attention actor's state, its engine's load once that runs, and what it has been told of the cluster.

    `view` is the newest topology or epoch that it was given, `layout` what the deployment was meant to be then.
    """

    status: ActorStatus
    incarnation: str
    load: EngineLoad | None
    view: Topology | Epoch | None
    layout: Layout | None


@ray.remote
class AttentionActor:
    def __init__(self, rank: int, incarnation: str, config: DeploymentConfig) -> None:
        self._config = config
        self._member = Member("attention", rank, incarnation, config.attention, config)
        self._dtype = choose_dtype(self._member.device, config.model.dtype)
        self._text_config = TextConfig.from_dir(config.model.path, router_scores=config.model.router_scores)
        max_context = config.model.max_context or self._text_config.max_position_embeddings
        info = ModelInfo.from_dir(config.model.path, config.model.served_name, max_context)
        self._grammars = Grammars(config.model.path, info.vocab_size, info.eos_token_ids)
        self._images = ImageSpec.from_dir(config.model.path)
        self._decoder: Decoder | None = None
        self._engine: Engine | None = None
        self._outbox: Outbox | None = None
        self._p2p: P2PDispatcher | None = None
        self._gate: P2PGate | CollectiveGate | None = None
        self._view: Topology | Epoch | None = None
        self._layout: Layout | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._metrics = RayMetrics()
        self._timed: TimedDispatcher | None = None
        self._reporter: asyncio.Task[None] | None = None
        self._heard: dict[str, float] = {}  # gateway → when it last said that it lives
        self._shown = StateShown(self._state, call_in_state)

    async def load(self) -> None:
        """Reads everything but the routed experts; raises CheckpointError."""
        await self._member.load(self._load)

    def _load(self) -> None:
        self._decoder = load_decoder(
            Checkpoint(self._config.model.path),
            self._text_config,
            dtype=self._dtype,
            device=self._member.device,
            on_progress=self._member.on_progress,
        )

    async def start(self) -> None:
        """Starts the engine; it computes once it has been given a topology or an epoch."""
        assert self._decoder is not None, "load comes first"
        member, config = self._member, self._config
        self._outbox = Outbox()
        if config.transport_kind == "p2p":
            deadline_s = config.transport.deadline_s
            self._p2p = P2PDispatcher(member.number, deadline_s, member.tell_slot_lost)
            self._gate = gate = P2PGate(self._p2p, self._text_config.hidden_size, self._dtype)
            self._engine = self._make_engine(self._decoder, self._p2p, gate, self._outbox)
        else:
            collective = self._gate = CollectiveGate(member.form_group, member.tell_group_broken)
            self._engine = self._make_engine(self._decoder, collective, collective, self._outbox)
        self._sweeper = asyncio.create_task(self._end_silent_gateways(self._outbox))
        self._reporter = asyncio.create_task(report_regularly(self._report_metrics))
        member.start(self._run)

    def _run(self) -> None:
        assert self._engine is not None
        try:
            self._engine.run()
        finally:
            if self._p2p is not None:
                self._p2p.close()

    def _make_engine(self, decoder: Decoder, dispatcher: Dispatcher, gate: StepGate, outbox: Outbox) -> Engine:
        config = self._config.engine
        groups = layer_groups(self._config, self._text_config)
        pages = {kind: group.pages for kind, group in groups.items()}
        kv = KVPages(self._text_config, config.page_size, pages, self._dtype, self._member.device)
        scheduler = Scheduler(
            Limits(config.max_batch_tokens, config.max_running, config.max_waiting),
            PageAllocator(groups, config.page_size),
            clock=time.time,
        )
        max_context = self._config.model.max_context or self._text_config.max_position_embeddings
        self._timed = TimedDispatcher(dispatcher)
        micro_batching = MicroBatching(self._config.transport.micro_batches if self._p2p is not None else 1)
        stepper = Stepper(decoder, kv, self._timed, max_context, micro_batching)
        timed = self._timed
        timelines = Timelines(time.time, lambda: ExpertSeconds(timed.dispatch_s, timed.combine_s))
        return Engine(scheduler, stepper, gate, outbox.deliver, timelines=timelines)

    def _report_metrics(self) -> None:
        assert self._engine is not None and self._timed is not None
        report_engine(self._metrics, self._member.name, self._engine.load())
        report_transport(self._metrics, self._member.name, self._timed, self._transport_stats())

    def _transport_stats(self) -> DispatchStats:
        if self._p2p is not None:
            return self._p2p.stats
        assert isinstance(self._gate, CollectiveGate), "start comes first"
        return self._gate.stats or DispatchStats()  # nothing before the first epoch

    async def adopt(self, view: Topology | Epoch, layout: Layout) -> None:
        """Goes over to this topology (p2p) or epoch (collective) between two steps; returns when that is done.

        Raises GroupBroken when an epoch's group does not come about.
        """
        self._view, self._layout = view, layout
        if isinstance(view, Topology):
            assert isinstance(self._gate, P2PGate), "a topology is for the p2p transport, after start"
            await asyncio.wrap_future(self._gate.adopt(view))
        else:
            assert isinstance(self._gate, CollectiveGate), "an epoch is for the collective transport, after start"
            await asyncio.wrap_future(self._gate.adopt(view))

    # ---- for gateways

    async def submit(self, request: Request, gateway_id: str, *images_PD: NDArray[Any]) -> RequestRejected | None:
        """Queues a request whose outputs go to this gateway's stream; returns why not, if it is not taken.

        `images_PD`: the embeddings of its images, a row for each patch token, as `embeddings.to_array` makes them. They
        stay where they are, in the node's object store, until the request ends.
        """
        assert self._engine is not None and self._outbox is not None, "join comes first"
        try:
            matcher = None
            if request.grammar is not None:  # beside the event loop: a large one takes seconds
                matcher = await asyncio.to_thread(self._grammars.compile, request.grammar)
            self._engine.submit(request, matcher, self._patches(request, images_PD))
        except RequestRejected as rejection:
            return rejection
        # Outputs come through this event loop, so none is sorted before this.
        self._outbox.expect(request.request_id, gateway_id)
        self._heard.setdefault(gateway_id, time.monotonic())
        return None

    def _patches(self, request: Request, images_PD: Sequence[NDArray[Any]]) -> PromptPatches | None:
        if not request.images:
            return None
        assert self._images is not None, "the gateway takes images only if the checkpoint has an image encoder"
        return PromptPatches(request, [to_tensor(image_PD) for image_PD in images_PD], self._images.patch_token_id)

    async def keep_alive(self, gateway_id: str) -> None:
        """The gateway lives. One that had requests here and falls silent has them ended."""
        self._heard[gateway_id] = time.monotonic()

    async def _end_silent_gateways(self, outbox: Outbox) -> None:
        while True:
            await asyncio.sleep(_SILENT_GATEWAY_S / 4)
            now = time.monotonic()
            for gateway_id in [name for name, at in self._heard.items() if now - at > _SILENT_GATEWAY_S]:
                del self._heard[gateway_id]
                if requests := outbox.requests_of(gateway_id):
                    log.warning("gateway silent gateway=%s requests=%d", gateway_id, len(requests))
                    await self.abort(requests)

    async def abort(self, request_ids: Sequence[str]) -> int:
        """Ends these requests; returns how many were under way here."""
        return 0 if self._engine is None else self._engine.abort(request_ids)

    async def outputs(self, gateway_id: str) -> AsyncIterator[list[RequestOutput]]:
        """Everything for this gateway, one item per step; endless. A stream that is dropped aborts its requests."""
        assert self._outbox is not None, "join comes first"
        try:
            async for outputs in self._outbox.stream(gateway_id):
                yield outputs
        finally:
            await self.abort(self._outbox.requests_of(gateway_id))

    # ---- for the controller

    async def drain(self) -> int:
        """Stops admission for good; returns how many accepted requests have not ended."""
        return 0 if self._engine is None else self._engine.drain()

    async def reconfigure(self, live: LiveSettings) -> None:
        """Takes over what may change while requests run."""
        logging.getLogger().setLevel(live.log_level)
        if self._engine is not None:
            self._engine.limit_waiting(live.max_waiting)

    async def go_wrong(self, script: Sequence[Fault]) -> bool:
        """For drills: lets these befall the rows that it sends, instead of what was asked for before.

        Returns False with collectives, which have no messages of their own.
        """
        if self._p2p is None:
            return False
        self._p2p.faults = Faults(script, "attention", self._member.number)
        return True

    async def leave(self) -> None:
        """Ends the engine; requests under way fail as retryable."""
        if self._engine is not None and self._gate is not None:
            self._engine.stop()
            self._gate.close()

    async def until_ended(self) -> None:
        await self._member.until_ended()

    async def progress(self) -> tuple[int, int]:
        """Bytes loaded, bytes in all."""
        return self._member.loaded

    async def report(self) -> AttentionReport:
        return AttentionReport(
            self._member.status(),
            self._member.incarnation,
            None if self._engine is None else self._engine.load(),
            self._view,
            self._layout,
        )

    # ---- for Ray's dashboard

    def _state(self) -> str:
        epoch = "no epoch yet" if self._view is None else f"epoch {self._view.expert_map.epoch}"
        return f"{self._member.name}: {self._member.state}, {epoch}"

    async def in_state(self, words: str) -> None:
        """Lasts as long as the state does: see actors/dashboard.py."""
        await self._shown.until_not(words)

    def __repr__(self) -> str:
        return f"attention(rank {self._member.number}, {self._member.device})"


def layer_groups(config: DeploymentConfig, text_config: TextConfig) -> dict[LayerKind, LayerGroup]:
    """The page pools: full-attention layers hold `kv_tokens`, chunked ones the chunks of all running sequences."""
    chunk_size = text_config.attention_chunk_size
    full, chunked = pool_pages(config.engine, chunk_size or 0)
    groups: dict[LayerKind, LayerGroup] = {}
    if "full" in text_config.layer_kinds:
        groups["full"] = LayerGroup(full)
    if "chunked" in text_config.layer_kinds:
        assert chunk_size is not None, "a chunked layer has a chunk size"
        groups["chunked"] = LayerGroup(chunked, chunk_size)
    return groups
