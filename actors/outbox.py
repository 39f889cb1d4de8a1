"""The way of outputs from an engine's thread to the gateways: one message per step and gateway."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator

from engine.request import RequestOutput


class Outbox:
    """Sorts each step's outputs by the gateway that asked, and holds them until that gateway's stream takes them.

    `deliver` may be called from any thread; everything else belongs to the event loop that the outbox was made in.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._gateway_of: dict[str, str] = {}
        self._pending: defaultdict[str, list[RequestOutput]] = defaultdict(list)
        self._arrived: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    def expect(self, request_id: str, gateway_id: str) -> None:
        """Outputs of this request go to this gateway, until the last one."""
        self._gateway_of[request_id] = gateway_id

    def forget(self, request_id: str) -> None:
        """The request was not taken after all."""
        self._gateway_of.pop(request_id, None)

    def deliver(self, outputs: list[RequestOutput]) -> None:
        self._loop.call_soon_threadsafe(self._sort, outputs)

    def _sort(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            gateway_id = self._gateway_of[output.request_id]
            if output.finish_reason is not None:
                del self._gateway_of[output.request_id]
            self._pending[gateway_id].append(output)
            self._arrived[gateway_id].set()

    async def stream(self, gateway_id: str) -> AsyncIterator[list[RequestOutput]]:
        """All that has come for this gateway since the last item; endless."""
        while True:
            await self._arrived[gateway_id].wait()
            self._arrived[gateway_id].clear()
            yield self._pending.pop(gateway_id)

    def requests_of(self, gateway_id: str) -> list[str]:
        return [request_id for request_id, owner in self._gateway_of.items() if owner == gateway_id]
