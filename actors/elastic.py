"""Changes of layout while requests run: more or fewer actors, an expert moved, a slot drained, load evened out.

Every change decides on the next `Holdings` (cluster/, pure) and goes there by `Fleet.transition`, one at a time. What
cannot be done is a RequestRejected that names the field; what fails on the way is undone first.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from ray.exceptions import RayError

from actors.fleet import Fleet
from actors.reasons import first_line
from actors.repair import Repair
from actors.reports import ExpertReport
from actors.seats import Role, Seat, find_seat, give_up, reserve_more
from cluster.balance import Balance, LoadAverage, balancedness, rebalance
from cluster.holdings import Holdings, cost, move
from cluster.placement import Nodes, resize, without
from engine.request import ErrorCode, RequestRejected

log = logging.getLogger("herder")

_LOOK_EVERY_S = 1.0  # at the experts' counters
_LEAVE_TIMEOUT_S = 10.0


class Elastic:
    """What an operator, or the balance loop, may ask of a fleet."""

    def __init__(self, fleet: Fleet, repair: Repair, clock: Callable[[], float] = time.monotonic) -> None:
        self._fleet = fleet
        self._repair = repair
        self._clock = clock
        balance = fleet.config.balance
        self._average = LoadAverage(fleet.holdings.layers, fleet.holdings.num_experts, balance.window_s, clock)
        self._moved_at: float | None = None
        self.balance_before = 0.0

    # ---- what can be asked for

    async def scale_experts(self, actors: int) -> None:
        """Exactly this many expert actors."""
        async with self._fleet.changing:
            slots = self._numbers(self._fleet.experts, actors)
            target = self._decide("actors", lambda: resize(self._fleet.holdings, slots, *self._room(slots)))
            await self._go(target, "actors")

    async def scale_attention(self, actors: int) -> None:
        """Exactly this many attention actors; the requests of those that end go on at others."""
        fleet = self._fleet
        async with fleet.changing:
            ranks = self._numbers(fleet.attention, actors)
            new = await self._reserve("attention", [rank for rank in ranks if rank not in fleet.attention])
            try:
                await fleet.bring_up_beside(dict.fromkeys(new))
                fleet.attention |= {seat.number: seat for seat in new}
                await fleet.join(new)
            except Exception as error:
                for seat in new:
                    fleet.attention.pop(seat.number, None)
                    give_up(seat)
                raise _failed(error) from error
            for seat in new:
                self._repair.watch(seat)
            gone = [seat for rank, seat in fleet.attention.items() if rank not in ranks]
            await self._retire(gone)

    async def move(self, expert: int, to_slot: int, layer: int | None, from_slot: int | None) -> None:
        """One copy of an expert to another slot, in one layer or in all."""
        async with self._fleet.changing:
            holdings = self._fleet.holdings
            if to_slot not in holdings.slots:
                field = "to_slot"
            elif from_slot is not None and from_slot not in holdings.slots:
                field = "from_slot"
            else:
                field = "expert" if layer is None or layer in holdings.layers else "layer"
            target = self._decide(field, lambda: move(holdings, expert, to_slot, layer, from_slot))
            await self._go(target, field)

    async def drain_slot(self, slot: int) -> None:
        """The slot's experts go to the others, and its actor ends."""
        async with self._fleet.changing:
            holdings = self._fleet.holdings
            target = self._decide("slot", lambda: without(holdings, slot, *self._room(holdings.slots)))
            await self._go(target, "slot")

    async def rebalance(self) -> bool:
        """Spreads experts by the load of the last while; whether anything moved."""
        fleet = self._fleet
        if fleet.config.balance.mode == "off":
            raise RequestRejected("balance.mode is off: loads are not followed; set it to manual or auto")
        async with fleet.changing:
            loads = self._average.loads()
            slots, holdings = sorted(fleet.experts), fleet.holdings
            target = rebalance(loads, slots, *self._room(slots), holdings)
            if not cost(holdings, target).loads:
                return False
            before = balancedness(loads, holdings).total
            for step in _layer_by_layer(holdings, target):
                await self._go(step, "balance")
            self.balance_before, self._moved_at = before, self._clock()
            after = balancedness(loads, target).total
            log.info("rebalanced before=%.2f after=%.2f epoch=%d", before, after, fleet.epoch)
            return True

    # ---- the balance loop

    async def run(self) -> None:
        """Follows the experts' load; with balance.mode auto it moves experts when the load is too uneven.

        The fleet's balance settings may change meanwhile.
        """
        last = self._clock()
        while True:
            await asyncio.sleep(min(_LOOK_EVERY_S, self._fleet.config.balance.interval_s))
            balance = self._fleet.config.balance
            if balance.mode == "off":
                continue
            self._average.window_s = balance.window_s
            await self._look()
            if balance.mode == "manual" or self._clock() - last < balance.interval_s:
                continue
            last = self._clock()
            if self.balance.total > balance.threshold:
                try:
                    await self.rebalance()
                except RequestRejected as error:
                    log.warning("not rebalanced reason=%s", error)

    async def _look(self) -> None:
        seats = self._fleet.serving(self._fleet.experts).values()
        answers = await asyncio.gather(*(seat.handle.report.remote() for seat in seats), return_exceptions=True)
        reports = [answer for answer in answers if isinstance(answer, ExpertReport)]
        self._average.update({report.incarnation: report.rows for report in reports})

    @property
    def balance(self) -> Balance:
        """How even the load of the last while is over the slots."""
        return balancedness(self._average.loads(), self._fleet.holdings)

    @property
    def seconds_since_move(self) -> float | None:
        return None if self._moved_at is None else self._clock() - self._moved_at

    # ---- their parts

    def _room(self, slots: Iterable[int]) -> tuple[int | None, int, Nodes]:
        """Seats a slot, holders an expert, and the slots' nodes; that of a new slot is not known yet."""
        experts, there = self._fleet.config.experts, self._fleet.experts
        nodes = {slot: there[slot].node_id if slot in there else f"of slot {slot}" for slot in slots}
        return experts.per_actor, experts.replicas, nodes

    def _numbers(self, there: Mapping[int, Seat], actors: int) -> list[int]:
        """The lowest numbers stay; new ones are the lowest that are free."""
        if actors < 1:
            raise RequestRejected(f"actors must be at least 1, not {actors}", field="actors")
        kept = sorted(there)[:actors]
        free = (number for number in range(len(there) + actors) if number not in there)
        return sorted(kept + [next(free) for _ in range(actors - len(kept))])

    def _decide(self, field: str, decide: Callable[[], Holdings]) -> Holdings:
        try:
            return decide()
        except ValueError as error:  # ConfigError as well
            raise RequestRejected(str(error), field=field) from error

    async def _go(self, target: Holdings, field: str) -> None:
        fleet = self._fleet
        new = await self._reserve("expert", [slot for slot in target.slots if slot not in fleet.experts])
        gone = [seat for slot, seat in fleet.experts.items() if slot not in target.slots]
        try:
            await fleet.transition(target, new, gone)
        except Exception as error:
            log.warning("change of layout failed field=%s reason=%s", field, error)
            raise _failed(error) from error
        for seat in new:
            self._repair.watch(seat)

    async def _reserve(self, role: Role, numbers: Sequence[int]) -> list[Seat]:
        known = {number: await find_seat(role, number) for number in numbers}
        missing = [number for number, seat in known.items() if seat is None]
        try:
            more = await reserve_more(self._fleet.config, role, missing)
        except Exception as error:
            raise RequestRejected(str(error), field="actors", code=ErrorCode.UNAVAILABLE) from error
        return [*(seat for seat in known.values() if seat is not None), *more]

    async def _retire(self, seats: Sequence[Seat]) -> None:
        """Ends attention actors. Gateways hear of it first; what runs then ends as retryable, and goes on elsewhere."""
        fleet = self._fleet
        for seat in seats:
            seat.serving = False
        fleet.tell()
        if seats and fleet.config.transport_kind == "all_to_all":
            await fleet.republish()
        for seat in seats:
            try:
                await seat.handle.leave.remote()
                await asyncio.wait_for(seat.handle.until_ended.remote(), _LEAVE_TIMEOUT_S)
            except (TimeoutError, RayError) as error:
                log.warning("ended by force actor=%s reason=%s", seat.name, error)
            fleet.attention.pop(seat.number, None)
            give_up(seat)


def _layer_by_layer(holdings: Holdings, target: Holdings) -> list[Holdings]:
    """The way to `target` in steps of one layer each, so that no more than one layer's weights are held twice."""
    steps = []
    slots = {slot: dict(held) for slot, held in holdings.slots.items()}
    for layer in target.layers:
        changed = False
        for slot in slots:
            changed |= holdings.held(slot, layer) != target.held(slot, layer)
            slots[slot][layer] = target.held(slot, layer)
        if changed:
            steps.append(Holdings({slot: dict(held) for slot, held in slots.items()}))
    return steps


def _failed(error: Exception) -> RequestRejected:
    """What failed on the way and has been undone."""
    if isinstance(error, RequestRejected):
        return error
    return RequestRejected(f"it failed and has been undone: {first_line(error)}", code=ErrorCode.UNAVAILABLE)
