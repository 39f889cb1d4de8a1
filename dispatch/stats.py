"""What the two sides of the p2p transport count. Others than the owner only read."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from dispatch.all_to_all import DispatchStats
from dispatch.requests import Request


@dataclass
class P2PStats(DispatchStats):
    """DispatchStats, and what losses cost.

    Attributes:
        losses: connections that were lost.
        resent_rows: rows that went to another holder.
        lost_rows: rows that found no holder.
    """

    losses: int = 0
    resent_rows: int = 0
    lost_rows: int = 0


@dataclass
class ServerStats:
    """Running counts; others only read.

    Attributes:
        bytes_received, bytes_sent: rows.
        requests, batches: messages answered, and computations that took; their ratio is what batching gains.
        refused: messages refused.
        rows: layer -> logical expert -> rows computed.
    """

    bytes_received: int = 0
    bytes_sent: int = 0
    requests: int = 0
    batches: int = 0
    refused: int = 0
    rows: dict[int, dict[int, int]] = field(default_factory=dict)

    def count(self, layer: int, requests: Sequence[Request]) -> None:
        """Count the requests of one computation."""
        rows = self.rows[layer]
        self.batches += 1
        for request in requests:
            nbytes = request.header.rows * request.header.row_bytes
            self.requests += 1
            self.bytes_received += nbytes
            self.bytes_sent += nbytes
            for expert, count in zip(request.experts, request.counts, strict=True):
                rows[expert] = rows.get(expert, 0) + count
