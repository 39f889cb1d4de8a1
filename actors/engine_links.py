"""A gateway's connections to the attention actors, which come and go; the controller says which there are."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence

from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayError

from actors.detached import call_detached
from actors.reasons import first_line
from actors.status import EngineHandle
from engine.request import Request, RequestOutput, RequestRejected

log = logging.getLogger("herder")

_KEEP_ALIVE_S = 2.0
_FIRST_RETRY_S, _LAST_RETRY_S = 0.1, 2.0


class EngineLink:
    """One connection to one life of an attention actor.

    Its gateway id is its own, so nothing that an earlier connection has asked for can come through it. `listed`: the
    controller says that the engine takes requests. `open`: how many requests of this gateway it has.

    What it asks of the engine outlives its client: of a submission that ends with it nobody knew whether the engine has
    it, and the abort that follows would not come.
    """

    def __init__(self, name: str, handle: EngineHandle) -> None:
        self.name = name
        self.incarnation = handle.incarnation
        self.actor = handle.actor
        self.gateway_id = uuid.uuid4().hex
        self.listed = True
        self.open = 0
        self.pump: asyncio.Task[None] | None = None

    def submit(self, request: Request, embeddings: Sequence[ObjectRef]) -> Awaitable[RequestRejected | None]:
        """See AttentionActor.submit. Ray fetches the embeddings before it makes the call."""
        return call_detached(self.actor.submit, request, self.gateway_id, *embeddings)

    def abort(self, request_ids: Sequence[str]) -> Awaitable[int]:
        """See AttentionActor.abort."""
        return call_detached(self.actor.abort, list(request_ids))


class EngineLinks:
    """Connects to every engine that the controller tells of, for as long as it lives or has something to finish.

    Args:
        find_controller: looks the controller up, beside the event loop; raises ValueError when there is none.
        on_outputs: gets each step's outputs that come through a link.
        on_lost: gets a link whose outputs will not come any more, and why.
    """

    def __init__(
        self,
        find_controller: Callable[[], ActorHandle],
        on_outputs: Callable[[EngineLink, Sequence[RequestOutput]], None],
        on_lost: Callable[[EngineLink, str], None],
    ) -> None:
        self._find_controller = find_controller
        self._on_outputs = on_outputs
        self._on_lost = on_lost
        self._links: dict[str, EngineLink] = {}  # by name
        self._known: tuple[tuple[str, str], ...] = ()
        self._tasks: list[asyncio.Task[None]] = []
        self.controller: ActorHandle | None = None
        self.arrival = asyncio.Event()  # set, and replaced, when an engine comes

    async def start(self) -> None:
        """Connects, and follows the changes from then on. Raises ValueError or RayError without a controller."""
        self.controller = await asyncio.to_thread(self._find_controller)
        await self._watch()
        self._tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._keep_alive())]

    def all(self) -> list[EngineLink]:
        """Those that are up, whether they take requests or not."""
        return list(self._links.values())

    def by_load(self) -> list[EngineLink]:
        """Those that take requests, the ones with the fewest requests of this gateway first."""
        return sorted((link for link in self._links.values() if link.listed), key=lambda link: link.open)

    def is_up(self, link: EngineLink) -> bool:
        return self._links.get(link.name) is link

    def lose(self, link: EngineLink, reason: str) -> None:
        """Gives a connection up. Another to the same life of the engine may follow, if it is still listed."""
        if not self.is_up(link):
            return
        log.error("engine lost actor=%s incarnation=%s reason=%s", link.name, link.incarnation, reason)
        self._disconnect(link)
        self._on_lost(link, reason)

    def release(self, link: EngineLink) -> None:
        """Call it when a link has less to do: one that is not listed any more goes with its last request."""
        if not link.listed and not link.open and self.is_up(link):
            self._disconnect(link)

    # ---- its parts

    async def _follow(self) -> None:
        """Takes over every change. Nothing depends on the controller's being alive but the news of engines."""
        while True:
            try:
                await self._watch()
            except RayError as error:
                log.warning("controller lost reason=%s", first_line(error))
                await self._find_again()

    async def _find_again(self) -> None:
        delay = _FIRST_RETRY_S
        while True:
            await asyncio.sleep(delay)
            try:
                self.controller = await asyncio.to_thread(self._find_controller)
                return
            except (ValueError, RayError) as error:
                log.debug("no controller reason=%s", first_line(error))
                delay = min(2 * delay, _LAST_RETRY_S)

    async def _watch(self) -> None:
        """Until the engines differ from those that are known, or the controller has waited for long enough."""
        assert self.controller is not None, "start comes first"
        self._update(await self.controller.watch_engines.remote(self._known))

    def _update(self, listed: Mapping[str, EngineHandle]) -> None:
        self._known = tuple(sorted((name, handle.incarnation) for name, handle in listed.items()))
        for link in self.all():
            handle = listed.get(link.name)
            link.listed = handle is not None and handle.incarnation == link.incarnation
            if handle is not None and not link.listed:
                self.lose(link, "was replaced")
            self.release(link)
        for name, handle in listed.items():
            if name not in self._links:
                self._connect(name, handle)

    def _connect(self, name: str, handle: EngineHandle) -> None:
        link = self._links[name] = EngineLink(name, handle)
        link.pump = asyncio.create_task(self._pump(link))
        log.info("engine found actor=%s incarnation=%s", name, handle.incarnation)
        self.arrival.set()
        self.arrival = asyncio.Event()

    def _disconnect(self, link: EngineLink) -> None:
        del self._links[link.name]
        if link.pump is not None:
            link.pump.cancel()

    async def _pump(self, link: EngineLink) -> None:
        reason = "ended its stream"
        try:
            async for message in link.actor.outputs.remote(link.gateway_id):
                self._on_outputs(link, await message)
        except RayError as error:
            reason = f"died: {first_line(error)}"
        self.lose(link, reason)

    async def _keep_alive(self) -> None:
        """Engines end the requests of a gateway that falls silent."""
        while True:
            for link in self.all():
                link.actor.keep_alive.remote(link.gateway_id)
            await asyncio.sleep(_KEEP_ALIVE_S)
