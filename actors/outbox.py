"""The way of outputs from an engine's thread to the gateways: one message per step and gateway."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from engine.request import RequestOutput


@dataclass(slots=True)
class _Tray:
    """What waits for one gateway."""

    outputs: list[RequestOutput] = field(default_factory=list)
    filled: asyncio.Event = field(default_factory=asyncio.Event)


class Outbox:
    """Sorts each step's outputs by the gateway that asked, and holds them until that gateway's stream takes them.

    `deliver` may be called from any thread; everything else belongs to the event loop that the outbox was made in.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._gateway_of: dict[str, str] = {}
        self._trays: defaultdict[str, _Tray] = defaultdict(_Tray)

    def expect(self, request_id: str, gateway_id: str) -> None:
        """Outputs of this request go to this gateway, until the last one."""
        self._gateway_of[request_id] = gateway_id

    def expects(self, request_id: str) -> bool:
        """Whether the last output of this request has yet to be sorted."""
        return request_id in self._gateway_of

    def deliver(self, outputs: list[RequestOutput]) -> None:
        """Takes a step's outputs; does not block."""
        self._loop.call_soon_threadsafe(self._sort, outputs)

    def _sort(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            gateway_id = self._gateway_of[output.request_id]
            if output.finish_reason is not None:
                del self._gateway_of[output.request_id]
            tray = self._trays[gateway_id]
            tray.outputs.append(output)
            tray.filled.set()

    async def stream(self, gateway_id: str) -> AsyncIterator[list[RequestOutput]]:
        """All that has come for this gateway since the last item; endless."""
        try:
            while True:
                tray = self._trays[gateway_id]
                await tray.filled.wait()
                taken, tray.outputs = tray.outputs, []
                tray.filled.clear()
                yield taken
        finally:
            self._trays.pop(gateway_id, None)

    def requests_of(self, gateway_id: str) -> list[str]:
        """The requests under way for this gateway."""
        return [request_id for request_id, owner in self._gateway_of.items() if owner == gateway_id]
