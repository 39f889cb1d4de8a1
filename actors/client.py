"""The engines as the gateway sees them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Literal, Protocol

from actors.status import ClusterStatus
from engine.request import Request, RequestOutput


class EngineClient(Protocol):
    """All attention actors together, and the controller behind them.

    `scale`, `move`, `drain_slot` and `rebalance` change the deployment while requests run. They return when the change
    is in use everywhere, and what they began goes on when their caller is cancelled. They raise RequestRejected:
    INVALID_ARGUMENT, naming the argument, for what cannot be; UNAVAILABLE when it failed and all is as it was.
    """

    def generate(self, request: Request, images: Sequence[bytes] = ()) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of a request; the last one has a finish reason. Closing the generator aborts the request.

        `images`: the encoded files (PNG, JPEG ...) of `request.images`, one for one.

        Raises RequestRejected, before the first output, when the request is not admitted; field `messages` when one of
        the images cannot be read. A failure after that is an output with FinishReason.ERROR.
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

    async def scale(self, role: Literal["experts", "attention"], actors: int) -> None:
        """Start or end actors of `role` until there are so many (1 or more). Field of a refusal: `actors`."""
        ...

    async def move(self, expert: int, to_slot: int, layer: int | None = None, from_slot: int | None = None) -> None:
        """Move a copy of `expert` to a slot that does not hold it; in all MoE layers if `layer` is None.

        It comes from `from_slot`; None: from the one of its holders that has the highest load.
        """
        ...

    async def drain_slot(self, slot: int) -> None:
        """Move all experts of `slot` to the other slots, then end its actor."""
        ...

    async def rebalance(self) -> bool:
        """Replicate and move experts by their load, once and now; returns whether any was moved."""
        ...

    async def status(self) -> ClusterStatus:
        """The server's state now."""
        ...
