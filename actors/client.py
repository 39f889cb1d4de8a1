"""The engines as the gateway sees them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from actors.status import ClusterStatus
from engine.request import Request, RequestOutput


class EngineClient(Protocol):
    """All attention actors together."""

    def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of a request; the last one has a finish reason. Closing the generator aborts the request.

        Raises RequestRejected, before the first output, when the request is not admitted. A failure after that is an
        output with FinishReason.ERROR.
        """
        ...

    async def abort(self, request_ids: Sequence[str]) -> int:
        """End requests with FinishReason.ABORT; returns how many of them were waiting or running."""
        ...

    async def drain(self) -> int:
        """Take no more requests, from any gateway, for good; returns how many accepted ones have not ended.

        From its return on, `status` is not ready and `generate` raises RequestRejected (UNAVAILABLE).
        """
        ...

    async def status(self) -> ClusterStatus:
        """The server's state now."""
        ...
