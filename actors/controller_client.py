"""What an EngineClient asks of the controller."""

from __future__ import annotations

from typing import Literal

from ray.actor import ActorHandle

from actors.detached import call_detached
from actors.engine_links import EngineLinks
from actors.status import ClusterStatus
from engine.request import RequestRejected


class ControllerClient:
    """The calls of actors.client.EngineClient that the controller answers. `links` know where it is.

    A change of the deployment goes on to its end without the client that asked for it: it would be left half done.
    """

    def __init__(self, links: EngineLinks) -> None:
        self._links = links

    async def drain(self) -> int:
        """See EngineClient.drain."""
        remaining: int = await call_detached(self._controller.drain)
        return remaining

    async def scale(self, role: Literal["experts", "attention"], actors: int) -> None:
        """See EngineClient.scale."""
        _raise(await call_detached(self._controller.scale, role, actors))

    async def move(self, expert: int, to_slot: int, layer: int | None = None, from_slot: int | None = None) -> None:
        """See EngineClient.move."""
        _raise(await call_detached(self._controller.move, expert, to_slot, layer, from_slot))

    async def drain_slot(self, slot: int) -> None:
        """See EngineClient.drain_slot."""
        _raise(await call_detached(self._controller.drain_slot, slot))

    async def rebalance(self) -> bool:
        """See EngineClient.rebalance."""
        moved: bool | RequestRejected = await call_detached(self._controller.rebalance)
        if isinstance(moved, RequestRejected):
            raise moved
        return moved

    async def status(self) -> ClusterStatus:
        """See EngineClient.status."""
        status: ClusterStatus = await self._controller.status.remote()
        return status

    @property
    def _controller(self) -> ActorHandle:
        assert self._links.controller is not None, "start comes first"
        return self._links.controller


def _raise(refusal: RequestRejected | None) -> None:
    if refusal is not None:
        raise refusal
