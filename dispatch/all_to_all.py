"""Dispatch by all-to-all over an epoch's group: three collectives per MoE layer, entered by every member.

    counts  control plane  attention -> slots   (epoch, layer, bytes per row, rows per logical expert)
    rows    data plane     attention -> slots   rows sorted by (slot, expert)
    results data plane     slots -> attention   the same rows' results, in the senders' order

An attention rank posts all three in dispatch() and waits in combine(): it knows from its own routing how many results
come back, so the way home is open before the rows have left. A rank without tokens takes part with zero rows.

The code is the same for NCCL, with rows on the GPU: there wait() makes the current stream wait, so `wait_s` counts next
to nothing, and the results' receive stands behind the rows' send in NCCL's own stream, beside the caller's work. NCCL
cannot run on a machine without GPUs and is untested there.

Shape legend: T tokens, K top-k, N rows, D hidden width, E logical experts, S slots, A attention ranks, L experts of one
slot, W counts message.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dispatch.epoch import GroupBroken, StaleEpoch
from dispatch.expert_map import ExpertMap
from dispatch.groups import EpochGroup, Transfer
from dispatch.routing import GroupedExperts, HolderTable, Route, by_expert, route

_HEADER_FIELDS = 3  # epoch, layer, bytes per row


@dataclass
class DispatchStats:
    """Running counts of one member within one epoch; others only read.

    Attributes:
        bytes_sent, bytes_received: rows on the data plane.
        wait_s: seconds that this member stood waiting for others, in combine() or serve_layer().
        rows_E: layer -> int64 rows per logical expert that this member has dispatched (attention) or computed (slot).
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    wait_s: float = 0.0
    rows_E: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, expert_map: ExpertMap) -> "DispatchStats":
        num_experts = expert_map.num_experts
        return cls(rows_E={layer: torch.zeros(num_experts, dtype=torch.int64) for layer in expert_map.layers})

    def wait(self, transfers: Sequence[Transfer]) -> None:
        """Wait for transfers and count the time."""
        start = time.perf_counter()
        for transfer in transfers:
            transfer.wait()
        self.wait_s += time.perf_counter() - start


@dataclass(frozen=True, eq=False)
class Ticket:
    """One batch on its way; goes to combine() once."""

    epoch: int
    layer: int
    serial: int
    route: Route
    y_ND: Tensor


class AllToAllDispatcher:
    """An attention rank's side. For one thread.

    Args:
        group: the epoch's group, in which this process is an attention rank.
        expert_map: of the same epoch; all its slots take part in the group.

    Raises:
        StaleEpoch: the map and the group are of different epochs.
        ValueError: the map names a slot that takes no part.
    """

    def __init__(self, group: EpochGroup, expert_map: ExpertMap) -> None:
        assert group.rank < len(group.world.attention), "dispatchers run on attention ranks"
        _check_epoch(group, expert_map)
        self.stats = DispatchStats.of(expert_map)
        self._group = group
        self._tables = {
            layer: HolderTable.of(expert_map, layer, group.world.slots, group.device) for layer in expert_map.layers
        }
        self._to_attention = [0] * len(group.world.attention)
        self._nothing = [0] * group.world.size
        self._no_counts = torch.empty(0, dtype=torch.int64)
        self._serial = 0
        self._under_way: dict[int, tuple[Transfer, ...]] = {}

    def dispatch(self, x_TD: Tensor, expert_ids_TK: Tensor, layer: int) -> Ticket:
        """Post the batch to its experts and the receipt of the results; returns without waiting.

        All members must call it for the same layers in the same order, with zero rows if they have none.

        Args:
            x_TD: rows on the group's device; their type is the experts'.
            expert_ids_TK: integers from 0 to E-1, same device; K >= 1.
            layer: an MoE layer of the expert map.

        Raises:
            GroupBroken: the group is broken or closed.
        """
        group = self._group
        way = route(expert_ids_TK, self._tables[layer], first_holder=group.rank)
        x_ND = way.permute(x_TD)
        y_ND = torch.empty_like(x_ND)
        header = torch.tensor([group.epoch, layer, _row_bytes(x_ND)]).expand(len(group.world.slots), _HEADER_FIELDS)
        message_SW = torch.cat([header, way.counts_SE], dim=1)
        widths = self._to_attention + [message_SW.shape[1]] * len(group.world.slots)
        splits = self._to_attention + way.rows_per_slot
        doing = f"dispatching layer {layer}"
        transfers = (
            group.exchange_counts(self._no_counts, message_SW.view(-1), self._nothing, widths, doing),
            group.exchange_rows(x_ND[:0], x_ND, self._nothing, splits, doing),
            group.exchange_rows(y_ND, x_ND[:0], splits, self._nothing, f"combining layer {layer}"),
        )
        self._serial += 1
        self._under_way[self._serial] = transfers
        self.stats.bytes_sent += x_ND.nbytes
        self.stats.rows_E[layer] += way.counts_SE.sum(0)
        return Ticket(group.epoch, layer, self._serial, way, y_ND)

    def combine(self, ticket: Ticket) -> Tensor:
        """Wait for the results of a dispatched batch: y_TKD, unscaled, in the tokens' order.

        Raises:
            StaleEpoch: the ticket is of another epoch.
            ValueError: the ticket has been combined already.
            GroupBroken: a member died or did not answer in time.
        """
        if ticket.epoch != self._group.epoch:
            doing = f"combining layer {ticket.layer}"
            raise StaleEpoch(self._group.epoch, doing, f"the ticket is of epoch {ticket.epoch}")
        transfers = self._under_way.pop(ticket.serial, None)
        if transfers is None:
            raise ValueError(f"ticket {ticket.serial} of layer {ticket.layer} has been combined already")
        self.stats.wait(transfers)
        self.stats.bytes_received += ticket.y_ND.nbytes
        return ticket.route.unpermute(ticket.y_ND)

    def take_lost(self, num_tokens: int) -> frozenset[int]:
        """No token: what is lost here breaks the group, and the whole step with it."""
        return frozenset()


class ExpertRank:
    """A slot's side: serves the dispatches of all attention ranks. For one thread.

    Args:
        group: the epoch's group, in which this process has `slot`'s rank.
        expert_map: of the same epoch.
        slot: this process's slot.
        experts: holds the experts that the map gives to `slot`, on the group's device.
        width: hidden width D of a row.
        dtype: type of a row.

    Raises:
        StaleEpoch: the map and the group are of different epochs.
    """

    def __init__(
        self,
        group: EpochGroup,
        expert_map: ExpertMap,
        slot: int,
        experts: GroupedExperts,
        width: int,
        dtype: torch.dtype,
    ) -> None:
        assert group.rank == group.world.slot_rank(slot), "the group's rank is the slot's"
        _check_epoch(group, expert_map)
        self.stats = DispatchStats.of(expert_map)
        self._group = group
        self._experts = experts
        self._held = expert_map.experts_of(slot)
        self._layers = expert_map.layers
        self._no_rows = torch.empty(0, width, dtype=dtype, device=group.device)
        self._to_slots = [0] * len(group.world.slots)
        self._nothing = [0] * group.world.size
        self._num_experts = expert_map.num_experts

    def serve_step(self) -> None:
        """Serve one dispatch of every MoE layer, in order.

        Raises:
            GroupBroken, StaleEpoch: as serve_layer().
        """
        for layer in self._layers:
            self.serve_layer(layer)

    def serve_layer(self, layer: int) -> None:
        """Receive one dispatch of `layer` from every attention rank, compute, send the results back.

        Raises:
            StaleEpoch: a sender is at another epoch.
            GroupBroken: a sender is at another layer, sends rows of another size or rows for experts that this slot
                does not hold; or a member died or did not answer in time.
        """
        counts_AE = self._receive_counts(layer)
        held = self._held.get(layer, ())
        counts_AL = counts_AE[:, list(held)]
        splits = counts_AE.sum(1).tolist() + self._to_slots
        num_rows = sum(splits)
        if int(counts_AL.sum()) != num_rows:
            raise GroupBroken(self._group.epoch, f"serving layer {layer}", "rows came for experts that are not here")
        x_ND = self._no_rows.new_empty(num_rows, self._no_rows.shape[1])
        rows = self._group.exchange_rows(x_ND, self._no_rows, splits, self._nothing, f"receiving rows of layer {layer}")
        self.stats.wait([rows])
        y_ND = self._compute(layer, x_ND, held, counts_AL)
        doing = f"returning results of layer {layer}"
        back = self._group.exchange_rows(self._no_rows, y_ND, self._nothing, splits, doing)
        self.stats.wait([back])
        self.stats.bytes_received += x_ND.nbytes
        self.stats.bytes_sent += y_ND.nbytes
        self.stats.rows_E[layer] += counts_AE.sum(0)

    def _compute(self, layer: int, x_ND: Tensor, held: Sequence[int], counts_AL: Tensor) -> Tensor:
        if not x_ND.shape[0]:
            return x_ND
        order_N = by_expert(counts_AL).to(x_ND.device)
        y_sorted_ND = self._experts(layer, x_ND[order_N], held, counts_AL.sum(0).tolist())
        assert y_sorted_ND.shape == x_ND.shape and y_sorted_ND.dtype == x_ND.dtype
        y_ND = torch.empty_like(x_ND)
        y_ND[order_N] = y_sorted_ND
        return y_ND

    def _receive_counts(self, layer: int) -> Tensor:
        """counts_AE of all senders, their headers checked."""
        group, doing = self._group, f"receiving counts of layer {layer}"
        senders, width = len(group.world.attention), _HEADER_FIELDS + self._num_experts
        message_AW = torch.empty(senders, width, dtype=torch.int64)
        nothing_sent = torch.empty(0, dtype=torch.int64)
        splits = [width] * senders + self._to_slots
        self.stats.wait([group.exchange_counts(message_AW.view(-1), nothing_sent, splits, self._nothing, doing)])
        expected = (group.epoch, layer, _row_bytes(self._no_rows))
        for rank, (epoch, their_layer, row_bytes) in enumerate(message_AW[:, :_HEADER_FIELDS].tolist()):
            if (epoch, their_layer, row_bytes) == expected:
                continue
            broken = StaleEpoch if epoch != group.epoch else GroupBroken
            theirs = f"epoch {epoch}, layer {their_layer}, {row_bytes} bytes a row"
            ours = f"epoch {expected[0]}, layer {expected[1]}, {expected[2]} bytes a row"
            raise broken(group.epoch, doing, f"{group.world.name(rank)} sends {theirs}; expected {ours}")
        return message_AW[:, _HEADER_FIELDS:]


def _check_epoch(group: EpochGroup, expert_map: ExpertMap) -> None:
    if expert_map.epoch != group.epoch:
        raise StaleEpoch(group.epoch, "taking up the expert map", f"the map is of epoch {expert_map.epoch}")


def _row_bytes(x_ND: Tensor) -> int:
    return x_ND.shape[1] * x_ND.element_size()
