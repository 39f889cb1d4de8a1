"""From epoch to epoch with the collective transport: leave one group, form the next, inside living processes.

The controller calls every member of an epoch to it (`adopt`). A member that sits in a group leaves it at the next
header, with all others; one whose group broke waits for the call. Nothing is lost that had been computed: a step that
broke is run again in the next epoch.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from dispatch.all_to_all import AllToAllDispatcher, DispatchStats, ExpertRank, Ticket
from dispatch.epoch import Epoch, GroupBroken
from dispatch.gate import StepAnswer
from dispatch.groups import EpochGroup
from dispatch.lockstep import Lockstep
from dispatch.routing import GroupedExperts

log = logging.getLogger("herder")


Form = Callable[[Epoch], EpochGroup]


class _Calls:
    """The newest epoch that this member is called to. From any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._call: tuple[Epoch, Future[None]] | None = None
        self._closed = False

    @property
    def pending(self) -> bool:
        return self._call is not None or self._closed

    def put(self, epoch: Epoch) -> Future[None]:
        """The future tells when this member has formed the group; a call that a later one overtakes is cancelled."""
        future: Future[None] = Future()
        with self._changed:
            if self._call is not None:
                self._call[1].cancel()
            self._call = epoch, future
            self._changed.notify_all()
        return future

    def take(self) -> tuple[Epoch, Future[None]] | None:
        """Blocks until there is a call; None once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self.pending)
            call, self._call = self._call, None
            return None if self._closed else call

    def close(self) -> None:
        with self._changed:
            self._closed = True
            if self._call is not None:
                self._call[1].cancel()
            self._changed.notify_all()


@dataclass(slots=True)
class _Seat:
    """A member's place in an epoch's group."""

    epoch: Epoch
    group: EpochGroup
    lockstep: Lockstep


class _Member:
    """What both sides share: the calls, the seat, the way into the next epoch."""

    def __init__(self, form: Form, on_broken: Callable[[str], None]) -> None:
        self._form = form
        self._on_broken = on_broken
        self._calls = _Calls()
        self._seat: _Seat | None = None

    def adopt(self, epoch: Epoch) -> Future[None]:
        """Calls this member to an epoch, from any thread; the future is done when its group is formed here.

        It fails with GroupBroken when the group does not come about, and is cancelled when a later call comes first.
        """
        future = self._calls.put(epoch)
        self.ring()
        return future

    def close(self) -> None:
        """No more epochs. From any thread."""
        self._calls.close()
        self.ring()

    def ring(self) -> None:
        """Ends everybody's wait. From any thread."""
        seat = self._seat
        if seat is not None:
            try:
                seat.lockstep.ring()
            except GroupBroken as error:  # then nobody waits there
                log.debug("not rung reason=%s", error)

    def enter(self) -> _Seat | None:
        """Blocks until a group is formed; None once closed."""
        while (call := self._calls.take()) is not None:
            epoch, future = call
            if not future.set_running_or_notify_cancel():
                continue
            try:
                group = self._form(epoch)
            except GroupBroken as error:
                self._on_broken(str(error))
                future.set_exception(error)
                continue
            self._seat = _Seat(epoch, group, Lockstep(group))
            future.set_result(None)
            return self._seat
        return None

    def leave_group(self) -> None:
        seat, self._seat = self._seat, None
        if seat is not None:
            seat.group.close()

    def broken(self, error: GroupBroken) -> None:
        """Leaves a group that is of no use, and tells of it."""
        self.leave_group()
        self._on_broken(str(error))


class CollectiveGate(_Member):
    """An attention member: says when to step, and dispatches. `adopt`, `close` and `ring` are for any thread."""

    def __init__(self, form: Form, on_broken: Callable[[str], None]) -> None:
        """`form` meets the others; `on_broken` is told why a group broke."""
        super().__init__(form, on_broken)
        self._dispatcher: AllToAllDispatcher | None = None
        self._come_again = False

    @property
    def stats(self) -> DispatchStats | None:
        """Counts of the present epoch."""
        return None if self._dispatcher is None else self._dispatcher.stats

    def begin(self, rows: int, leaving: bool) -> StepAnswer:
        """Exchanges headers with all members; between groups it blocks until the next one is formed.

        Raises:
            GroupBroken: see `recover`.
        """
        if self._seat is None:
            seat = None if leaving else self.enter()
            if seat is None:
                return StepAnswer(idle=False, leaving=True)
            self._dispatcher = AllToAllDispatcher(seat.group, seat.epoch.expert_map)
            return self._again(renewed=True)
        header = self._seat.lockstep.begin(rows, leaving or self._calls.pending)
        if not header.leaving:
            return StepAnswer(header.idle)
        self.leave_group()
        return StepAnswer(idle=False, leaving=True) if leaving else self._again()

    def _again(self, renewed: bool = False) -> StepAnswer:
        """Work that came while groups changed was rung for in the old one: the caller has to look once more."""
        self._come_again = True
        return StepAnswer(idle=True, renewed=renewed)

    def wait(self) -> None:
        """After an idle answer: blocks, without CPU, until some member rings."""
        again, self._come_again = self._come_again, False
        if self._seat is not None and not again:
            self._seat.lockstep.wait()

    def recover(self, error: GroupBroken) -> None:
        """After GroupBroken: gives the group up, so that `begin` enters the next epoch."""
        self.broken(error)

    def dispatch(self, x_TD: Tensor, expert_ids_TK: Tensor, layer: int) -> Ticket:
        """See AllToAllDispatcher.dispatch."""
        assert self._dispatcher is not None, "begin comes first"
        return self._dispatcher.dispatch(x_TD, expert_ids_TK, layer)

    def combine(self, ticket: Ticket) -> Tensor:
        """See AllToAllDispatcher.combine."""
        assert self._dispatcher is not None, "begin comes first"
        return self._dispatcher.combine(ticket)

    def take_lost(self, num_tokens: int) -> frozenset[int]:
        """None: a collective has all rows or breaks."""
        return frozenset()


class CollectiveServer(_Member):
    """A slot: serves epoch after epoch. `run` is for a thread of its own; the rest for any thread."""

    def __init__(
        self,
        slot: int,
        experts: GroupedExperts,
        width: int,
        dtype: torch.dtype,
        form: Form,
        on_broken: Callable[[str], None],
    ) -> None:
        """`width` and `dtype` are a row's; `form` and `on_broken` as in CollectiveGate."""
        super().__init__(form, on_broken)
        self._slot = slot
        self._experts = experts
        self._width = width
        self._dtype = dtype
        self.stats: DispatchStats | None = None

    def run(self) -> None:
        """Serves until `close`."""
        while (seat := self.enter()) is not None:
            rank = ExpertRank(seat.group, seat.epoch.expert_map, self._slot, self._experts, self._width, self._dtype)
            self.stats = rank.stats
            try:
                self._serve(seat.lockstep, rank)
            except GroupBroken as error:
                self.broken(error)
            else:
                self.leave_group()

    def _serve(self, lockstep: Lockstep, rank: ExpertRank) -> None:
        while not (header := lockstep.begin(0, self._calls.pending)).leaving:
            if header.idle:
                lockstep.wait()
            else:
                rank.serve_step()
