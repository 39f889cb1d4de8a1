"""Dispatch without travel: every expert is here. The oracle that every other dispatcher is compared with.

Shape legend: T tokens, K top-k, N = T*K rows, D hidden width, E logical experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dispatch.routing import GroupedExperts, HolderTable, route

_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class LocalTicket:
    """One dispatched batch; y_TKD is its result."""

    serial: int
    y_TKD: Tensor


class LocalDispatcher:
    """Computes at dispatch, with the experts of this process.

    Args:
        experts: holds all experts of all layers.
        num_experts: logical experts per layer, E.
        device: where the rows are.
    """

    def __init__(self, experts: GroupedExperts, num_experts: int, device: torch.device = _CPU) -> None:
        self._experts = experts
        self._expert_ids = range(num_experts)
        self._table = HolderTable.single(num_experts, device)
        self._serial = 0
        self._open: set[int] = set()

    def dispatch(self, x_TD: Tensor, expert_ids_TK: Tensor, layer: int) -> LocalTicket:
        """Send each token to its K experts of `layer`; combine() gives the results."""
        self._serial += 1
        self._open.add(self._serial)
        return LocalTicket(self._serial, self._compute(x_TD, expert_ids_TK, layer))

    def _compute(self, x_TD: Tensor, expert_ids_TK: Tensor, layer: int) -> Tensor:
        if expert_ids_TK.numel() == 1:  # nothing to sort; sorting takes longer than all else here
            return self._experts(layer, x_TD, expert_ids_TK.tolist()[0], (1,))[:, None]
        way = route(expert_ids_TK, self._table)
        y_ND = way.permute(x_TD)
        if y_ND.shape[0]:
            y_ND = self._experts(layer, y_ND, self._expert_ids, way.counts_SE[0].tolist())
        return way.unpermute(y_ND)

    def combine(self, ticket: LocalTicket) -> Tensor:
        """y_TKD of a dispatched batch.

        Raises:
            ValueError: the ticket has been combined before.
        """
        if ticket.serial not in self._open:
            raise ValueError(f"ticket {ticket.serial} has been combined already")
        self._open.remove(ticket.serial)
        return ticket.y_TKD

    def take_lost(self, num_tokens: int) -> frozenset[int]:
        """No token: every expert is here."""
        return frozenset()
