"""What an attention actor's engine is made of, put together for the deployment's transport.

Imports torch and numba, so that only attention actors import it, as they begin.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from numpy.typing import NDArray

from actors.embeddings import to_tensor
from actors.member import Member
from actors.model_info import ModelInfo
from actors.outbox import Outbox
from actors.timed_dispatcher import TimedDispatcher
from cluster.config import DeploymentConfig
from cluster.kv_pools import pool_pages
from dispatch.all_to_all import DispatchStats
from dispatch.collective import CollectiveGate
from dispatch.epoch import Epoch
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
from engine.request import ExpertSeconds, Request
from engine.scheduler import Limits, Scheduler
from engine.step import Stepper
from engine.timeline import Timelines
from llama4.config import TextConfig
from llama4.decoder import Decoder
from llama4.kv_pages import KVPages
from llama4.moe import Dispatcher
from llama4.precision import choose_dtype
from llama4.weights import Checkpoint, load_decoder


class EngineParts:
    """First `load`, then `assemble`, then `run` on a thread of its own until `stop`."""

    def __init__(self, config: DeploymentConfig, member: Member) -> None:
        self._config = config
        self._member = member
        self._dtype = choose_dtype(member.device, config.model.dtype)
        self._text_config = TextConfig.from_dir(config.model.path, router_scores=config.model.router_scores)
        self._max_context = config.model.max_context or self._text_config.max_position_embeddings
        info = ModelInfo.from_dir(config.model.path, config.model.served_name, self._max_context)
        self.grammars = Grammars(config.model.path, info.vocab_size, info.eos_token_ids)
        self._images = ImageSpec.from_dir(config.model.path)
        self._groups = layer_groups(config, self._text_config)
        self._decoder: Decoder | None = None
        self._kv: KVPages | None = None
        self._p2p: P2PDispatcher | None = None
        self._gate: P2PGate | CollectiveGate | None = None
        self._engine: Engine | None = None
        self.timed: TimedDispatcher | None = None

    def load(self) -> None:
        """Reads everything but the routed experts, and takes the memory for KV; raises CheckpointError."""
        self._decoder = load_decoder(
            Checkpoint(self._config.model.path),
            self._text_config,
            dtype=self._dtype,
            device=self._member.device,
            on_progress=self._member.on_progress,
        )
        pages = {kind: group.pages for kind, group in self._groups.items()}
        page_size = self._config.engine.page_size
        self._kv = KVPages(self._text_config, page_size, pages, self._dtype, self._member.device)
        self._kv.take_memory()  # here, since OpenMP keeps threads for whichever thread has computed, and this one ends

    def assemble(self, outbox: Outbox) -> Engine:
        """The engine, whose outputs go to `outbox`."""
        assert self._decoder is not None and self._kv is not None, "load comes first"
        member = self._member
        if self._config.transport_kind == "p2p":
            deadline_s = self._config.transport.deadline_s
            self._p2p = P2PDispatcher(member.number, deadline_s, member.tell_slot_lost)
            width = self._text_config.hidden_size
            self._gate = gate = P2PGate(self._p2p, width, self._dtype, lanes_on=member.lanes_on)
            self._engine = self._make_engine(self._decoder, self._kv, self._p2p, gate, outbox)
        else:
            collective = self._gate = CollectiveGate(member.form_group, member.tell_group_broken)
            self._engine = self._make_engine(self._decoder, self._kv, collective, collective, outbox)
        return self._engine

    def _make_engine(
        self, decoder: Decoder, kv: KVPages, dispatcher: Dispatcher, gate: StepGate, outbox: Outbox
    ) -> Engine:
        config = self._config.engine
        scheduler = Scheduler(
            Limits(config.max_batch_tokens, config.max_running, config.max_waiting),
            PageAllocator(self._groups, config.page_size),
            clock=time.time,
        )
        self.timed = timed = TimedDispatcher(dispatcher)
        micro_batching = MicroBatching(self._config.transport.micro_batches if self._p2p is not None else 1)
        stepper = Stepper(decoder, kv, timed, self._max_context, micro_batching)
        timelines = Timelines(time.time, lambda: ExpertSeconds(timed.dispatch_s, timed.combine_s))
        return Engine(scheduler, stepper, gate, outbox.deliver, timelines=timelines)

    def run(self) -> None:
        """Computes until `stop`."""
        assert self._engine is not None, "assemble comes first"
        try:
            self._engine.run()
        finally:
            if self._p2p is not None:
                self._p2p.close()

    def stop(self) -> None:
        """Ends the engine; requests under way fail as retryable. From any thread."""
        assert self._engine is not None and self._gate is not None, "assemble comes first"
        self._engine.stop()
        self._gate.close()

    def adopt(self, view: Topology | Epoch) -> Future[None]:
        """Goes over to this topology (p2p) or epoch (collective) between two steps; the future tells when."""
        if isinstance(view, Topology):
            assert isinstance(self._gate, P2PGate), "a topology is for the p2p transport, after assemble"
            return self._gate.adopt(view)
        assert isinstance(self._gate, CollectiveGate), "an epoch is for the collective transport, after assemble"
        return self._gate.adopt(view)

    def patches(self, request: Request, images_PD: Sequence[NDArray[Any]]) -> PromptPatches | None:
        """A request's images, whose embeddings share the arrays' memory. Raises RequestRejected if they do not fit."""
        if not request.images:
            return None
        assert self._images is not None, "the gateway takes images only if the checkpoint has an image encoder"
        return PromptPatches(request, [to_tensor(image_PD) for image_PD in images_PD], self._images.patch_token_id)

    def go_wrong(self, script: Sequence[Fault]) -> bool:
        """See AttentionActor.go_wrong."""
        if self._p2p is None:
            return False
        self._p2p.faults = Faults(script, "attention", self._member.number)
        return True

    def transport_stats(self) -> DispatchStats:
        """What the transport counts. A collective counts anew in each epoch."""
        if self._p2p is not None:
            return self._p2p.stats
        assert isinstance(self._gate, CollectiveGate), "assemble comes first"
        return self._gate.stats or DispatchStats()  # nothing before the first epoch


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
