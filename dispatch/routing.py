"""Which row goes where: pure functions of the router's choice and the expert map.

A row is one (token, k) pair; row r belongs to token r // K. Rows travel sorted by (slot, expert), stably, so that each
slot's rows are one block and, within it, each expert's rows are one run in token order.

Shape legend: T tokens, K top-k, N = T*K rows, D hidden width, E logical experts, S slots, H most holders of an expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from dispatch.expert_map import ExpertMap

Holder = TypeVar("Holder")


class GroupedExperts(Protocol):
    """What computes: some experts of some layers."""

    def __call__(self, layer: int, x_ND: Tensor, expert_ids: Sequence[int], counts: Sequence[int]) -> Tensor:
        """y_ND of x_ND; its first counts[0] rows are logical expert expert_ids[0]'s and so on. Counts may be 0."""


@dataclass(frozen=True, eq=False)
class HolderTable:
    """One layer's holders as tensors, made once per epoch and layer so that no step builds them again.

    Attributes:
        num_slots: destinations; position s stands for the s-th slot of the world.
        holders_EH: int64, positions of expert e's holders in its first copies_E[e] columns; the rest are padding.
        copies_E: int64, number of holders of each expert.
    """

    num_slots: int
    holders_EH: Tensor
    copies_E: Tensor

    @classmethod
    def of(cls, expert_map: ExpertMap, layer: int, slots: Sequence[int], device: torch.device) -> "HolderTable":
        """The table of `layer` with slots numbered by their place in `slots`.

        Raises:
            ValueError: an expert of the layer is held by a slot that is not in `slots`.
        """
        place = {slot: position for position, slot in enumerate(slots)}
        for expert, holders in enumerate(expert_map.slots[layer]):
            for slot in holders:
                if slot not in place:
                    raise ValueError(f"slots[{layer}][{expert}] names slot {slot}, which takes no part: {tuple(slots)}")
        experts = expert_map.slots[layer]
        widest = max(len(holders) for holders in experts)
        rows = [[place[slot] for slot in holders] + [0] * (widest - len(holders)) for holders in experts]
        copies = [len(holders) for holders in experts]
        return cls(len(slots), torch.tensor(rows, device=device), torch.tensor(copies, device=device))

    @classmethod
    def single(cls, num_experts: int, device: torch.device) -> "HolderTable":
        """The table of one place that holds every expert."""
        zeros_EH = torch.zeros(num_experts, 1, dtype=torch.int64, device=device)
        return cls(1, zeros_EH, torch.ones(num_experts, dtype=torch.int64, device=device))


@dataclass(frozen=True, eq=False)
class Route:
    """Where the rows of one step and layer go.

    Attributes:
        order_N: int64, order_N[i] is the row that travels at place i.
        top_k: K.
        counts_SE: int64 on the CPU, rows for each slot and logical expert.
        rows_per_slot: rows for each slot, the split sizes of the payload.
    """

    order_N: Tensor
    top_k: int
    counts_SE: Tensor
    rows_per_slot: list[int]

    def permute(self, x_TD: Tensor) -> Tensor:
        """x_ND: every token's K rows, in the order of travel."""
        return x_TD.index_select(0, self.order_N if self.top_k == 1 else self.order_N // self.top_k)

    def unpermute(self, y_ND: Tensor) -> Tensor:
        """y_TKD from rows in the order of travel."""
        y = torch.empty_like(y_ND).index_copy_(0, self.order_N, y_ND)
        return y.view(-1, self.top_k, y_ND.shape[1])


def route(expert_ids_TK: Tensor, table: HolderTable, first_holder: int = 0) -> Route:
    """Sort the rows by (slot, expert), sharing each expert's rows out evenly over its holders.

    The j-th row of an expert, in row order, goes to holder (j + first_holder) modulo the number of its holders. Senders
    with different `first_holder` start at different replicas, so that many senders of one row each do not all choose
    the same one. Deterministic; the one wait for the device is the reading of the counts.

    Args:
        expert_ids_TK: integers from 0 to E-1 on the table's device; K >= 1.
        table: the layer's holders.
        first_holder: where the round-robin starts.
    """
    num_experts, widest = table.holders_EH.shape
    top_k = expert_ids_TK.shape[1]
    expert_N = expert_ids_TK.reshape(-1).long()
    if table.num_slots == 1:
        key_N = expert_N
    elif widest == 1:
        key_N = table.holders_EH[expert_N, 0] * num_experts + expert_N
    else:
        turn_N = index_within_group(expert_N, num_experts) + first_holder
        key_N = table.holders_EH[expert_N, turn_N % table.copies_E[expert_N]] * num_experts + expert_N
    order_N = torch.argsort(key_N, stable=True)
    counts_SE = torch.bincount(key_N, minlength=table.num_slots * num_experts).view(table.num_slots, num_experts).cpu()
    return Route(order_N, top_k, counts_SE, counts_SE.sum(1).tolist())


def share_out(
    expert_ids_TK: Tensor, holders: Sequence[Sequence[Holder]], turn: int
) -> dict[Holder | None, list[tuple[int, list[int]]]]:
    """Which holder gets which rows, in plain Python: for few rows a fraction of what route() takes.

    The rows of an expert are shared out evenly over its holders, beginning with another one for each expert and turn.

    Args:
        expert_ids_TK: integers from 0 to E-1.
        holders: for each expert; it may have none.
        turn: where the round-robin starts.

    Returns:
        For each holder that gets any its experts and the rows of each, ascending; under None those that nobody holds.
    """
    rows_of: dict[int, list[int]] = {}
    row = 0
    for experts in expert_ids_TK.tolist():
        for expert in experts:
            if expert in rows_of:
                rows_of[expert].append(row)
            else:
                rows_of[expert] = [row]
            row += 1
    shares: dict[Holder | None, list[tuple[int, list[int]]]] = {}
    for expert, rows in rows_of.items():
        among = holders[expert]
        if len(among) <= 1:
            shares.setdefault(among[0] if among else None, []).append((expert, rows))
            continue
        turn += 1
        for place in range(min(len(among), len(rows))):
            holder = among[(place + turn) % len(among)]
            shares.setdefault(holder, []).append((expert, rows[place :: len(among)]))
    return shares


def index_within_group(group_N: Tensor, num_groups: int) -> Tensor:
    """For each row, how many earlier rows have the same group; int64."""
    order_N = torch.argsort(group_N, stable=True)
    counts_G = torch.bincount(group_N, minlength=num_groups)
    starts_G = counts_G.cumsum(0) - counts_G
    index_N = torch.empty_like(order_N)
    index_N[order_N] = torch.arange(len(order_N), device=group_N.device) - starts_G[group_N[order_N]]
    return index_N


def by_expert(counts_AE: Tensor) -> Tensor:
    """The permutation from [source][expert] runs of rows to [expert][source] runs.

    Args:
        counts_AE: int64, rows of source a for expert e; sources' blocks lie one after the other.

    Returns:
        int64 permutation p_N: x_ND[p_N] is sorted by expert, sources in order within an expert, rows in order within a
        source.
    """
    num_sources, num_experts = counts_AE.shape
    expert_N = torch.arange(num_experts).repeat(num_sources).repeat_interleave(counts_AE.reshape(-1))
    return torch.argsort(expert_N, stable=True)
