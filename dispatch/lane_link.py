"""A link whose rows travel by a lane, from GPU to GPU: its socket carries headers and entries alone."""

import select
from array import array

import torch
from torch import Tensor

from dispatch.connections import Connection
from dispatch.lanes import LaneBroken
from dispatch.link import Link, LinkLost, Part
from dispatch.pieces import Pieces


class LaneLink(Link):
    """As Link. The results of a part come after their header, and the next header is read when they are there."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        assert connection.lane is not None, "its rows need a lane"
        self._lane = connection.lane
        self.fds = (self.fd, self._lane.fd)
        self._results_ND: Tensor | None = None  # on their way; they are of the oldest awaited part

    def prepare(self) -> Pieces | None:
        """See Link."""
        return super().prepare() if self._results_ND is None else None

    def receive(self, now: float) -> tuple[Part | None, int]:
        """See Link."""
        try:
            came = self._lane.received()
            if self._results_ND is not None:
                if not came:  # so it was the socket that woke us
                    raise LinkLost("it closed the connection")
                return self._take(self._results_ND, now), 0
            part, refusal = super().receive(now)
            if part is None or refusal:
                return part, refusal
            self.awaited.appendleft(part)
            x_TD = part.batch.x_TD
            self._results_ND = torch.empty((len(part.rows), x_TD.shape[1]), dtype=x_TD.dtype, device=x_TD.device)
            self._lane.receive(self._results_ND)
        except LaneBroken as error:
            raise LinkLost(f"its lane broke: {error}") from error
        self.heeds = select.EPOLLRDHUP  # the next header has to wait, a death has not
        return None, 0

    def close(self) -> list[Part]:
        """See Link."""
        self._lane.close()
        return super().close()

    def _take(self, results_ND: Tensor, now: float) -> Part:
        """The oldest awaited part, with its results where they belong."""
        self._results_ND, self.heeds = None, select.EPOLLIN
        self.heard_at = now
        part = self.awaited.popleft()
        batch = part.batch
        rows_N = torch.tensor(part.rows, device=results_ND.device)
        batch.y_TKD.view(batch.num_rows, -1).index_copy_(0, rows_N, results_ND)
        return part

    def _message(self, part: Part, head: bytes) -> Pieces:
        x_TD = part.batch.x_TD
        tokens_N = torch.tensor(part.tokens, device=x_TD.device)
        try:
            self._lane.send(x_TD.index_select(0, tokens_N))
        except LaneBroken as error:
            raise LinkLost(f"sending failed: {error}") from error
        return Pieces(array("B", head), x_TD, (), part.batch.row_bytes)

    def _room(self, part: Part) -> Pieces:
        return Pieces(self._header, part.batch.x_TD, (), part.batch.row_bytes)
