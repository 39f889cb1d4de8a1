"""An attention actor: a whole engine on a thread. Gateways reach it by few calls and one stream of outputs each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

import ray
from numpy.typing import NDArray

from actors.dashboard import StateShown, call_in_state
from actors.giving_way import import_giving_way
from actors.heartbeats import Heartbeats
from actors.logs import set_level
from actors.member import Member, log
from actors.outbox import Outbox
from actors.ray_metrics import RayMetrics, report_engine, report_regularly, report_transport
from actors.reports import AttentionReport, Layout
from cluster.config import DeploymentConfig
from cluster.live import LiveSettings
from dispatch.epoch import Epoch
from dispatch.faults import Fault
from dispatch.topology import Topology
from engine.request import GATEWAY_SILENT, ErrorCode, Request, RequestError, RequestOutput, RequestRejected

if TYPE_CHECKING:
    from engine.engine import Engine

_SILENT_GATEWAY_S = 10.0  # then its requests end: nobody would take their outputs


@ray.remote
class AttentionActor:
    def __init__(self, rank: int, incarnation: str, config: DeploymentConfig) -> None:
        import_giving_way("actors.engine_parts")
        from actors.engine_parts import EngineParts

        self._member = Member("attention", rank, incarnation, config.attention, config)
        self._parts = EngineParts(config, self._member)
        self._engine: Engine | None = None
        self._outbox: Outbox | None = None
        self._view: Topology | Epoch | None = None
        self._layout: Layout | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._metrics = RayMetrics()
        self._reporter: asyncio.Task[None] | None = None
        self._gateways = Heartbeats(_SILENT_GATEWAY_S)
        self._shown = StateShown(self._state, call_in_state)

    async def load(self) -> None:
        """Reads everything but the routed experts; raises CheckpointError."""
        await self._member.load(self._parts.load)

    async def start(self) -> None:
        """Starts the engine; it computes once it has been given a topology or an epoch."""
        self._outbox = Outbox()
        self._engine = self._parts.assemble(self._outbox)
        self._sweeper = asyncio.create_task(self._end_silent_gateways(self._outbox))
        self._reporter = asyncio.create_task(report_regularly(self._report_metrics))
        self._member.start(self._parts.run)

    def _report_metrics(self) -> None:
        assert self._engine is not None and self._parts.timed is not None
        report_engine(self._metrics, self._member.name, self._engine.load())
        report_transport(self._metrics, self._member.name, self._parts.timed, self._parts.transport_stats())

    async def adopt(self, view: Topology | Epoch, layout: Layout) -> None:
        """Goes over to this topology (p2p) or epoch (collective) between two steps; returns when that is done.

        Raises GroupBroken when an epoch's group does not come about.
        """
        self._view, self._layout = view, layout
        await asyncio.wrap_future(self._parts.adopt(view))

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
                matcher = await asyncio.to_thread(self._parts.grammars.compile, request.grammar)
            # The last output of one that the engine does not know any more may still be on its way to the outbox.
            if self._outbox.expects(request.request_id):
                message = f"request_id {request.request_id!r} has not ended here yet"
                return RequestRejected(message, field="request_id", code=ErrorCode.ALREADY_EXISTS)
            self._engine.submit(request, matcher, self._parts.patches(request, images_PD))
        except RequestRejected as rejection:
            return rejection
        # Outputs come through this event loop, so none is sorted before this.
        self._outbox.expect(request.request_id, gateway_id)
        self._gateways.expect(gateway_id)
        return None

    async def keep_alive(self, gateway_id: str) -> None:
        """The gateway lives. One that had requests here and falls silent has them ended."""
        self._gateways.hear(gateway_id)

    async def _end_silent_gateways(self, outbox: Outbox) -> None:
        while True:
            await asyncio.sleep(self._gateways.interval_s)
            for gateway_id in self._gateways.silent():
                if requests := outbox.requests_of(gateway_id):
                    log.warning("gateway silent gateway=%s requests=%d", gateway_id, len(requests))
                    await self.abort(requests, GATEWAY_SILENT)

    async def abort(self, request_ids: Sequence[str], error: RequestError | None = None) -> int:
        """Ends these requests, with this error if there is one; returns how many were under way here."""
        return 0 if self._engine is None else self._engine.abort(request_ids, error)

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
        set_level(live.log_level)
        if self._engine is not None:
            self._engine.limit_waiting(live.max_waiting)

    async def go_wrong(self, script: Sequence[Fault]) -> bool:
        """For drills: lets these befall the rows that it sends, instead of what was asked for before.

        Returns False with collectives, which have no messages of their own.
        """
        return self._parts.go_wrong(script)

    async def leave(self) -> None:
        """Ends the engine; requests under way fail as retryable."""
        if self._engine is not None:
            self._parts.stop()

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
