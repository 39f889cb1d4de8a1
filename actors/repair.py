"""Full strength by itself: sees that a member is lost, and puts a new one into its seat.

A member is lost when its loop ends, its process dies, it gives no answer, or an attention actor has given it up
(sockets tell of a death in milliseconds, Ray in a second) and does not answer a question of ours.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from ray.exceptions import RayError

from actors.fleet import Fleet, Unservable
from actors.reasons import first_line
from actors.seats import Seat
from dispatch.epoch import GroupBroken

log = logging.getLogger("herder")

_PING_EVERY_S = 5.0
_SILENT_S = 10.0  # an actor that gives no answer for so long is taken for stuck
_ANSWER_S = 2.0  # the same, when an attention actor has lost it already
_BACKOFF_S = 0.5  # after a failure; doubled at each further one
_LONGEST_BACKOFF_S = 30.0


class Repair:
    """Watches the members of a fleet and replaces those that are lost, until `stop`."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._tasks: set[asyncio.Task[None]] = set()
        self._doubted: set[str] = set()  # names of lives of slots that are being asked
        self._returns: Counter[int] = Counter()  # how often a slot was given up though it lives
        self._regrouping = False

    def watch(self, seat: Seat) -> None:
        """Replaces the seat's actor when it is lost, again and again."""
        self._spawn(self._watch(seat, seat.incarnation))

    def stop(self) -> None:
        """Replaces nobody any more."""
        for task in self._tasks:
            task.cancel()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # held, so that it is not collected while it waits
        task.add_done_callback(self._tasks.discard)

    async def _watch(self, seat: Seat, incarnation: str) -> None:
        actor = seat.handle
        ended = asyncio.ensure_future(_reason(actor.until_ended.remote()))
        while seat.incarnation == incarnation:
            done, _ = await asyncio.wait({ended}, timeout=_PING_EVERY_S)
            if done:
                return self.lost(seat, incarnation, ended.result())
            try:
                await asyncio.wait_for(actor.report.remote(), _SILENT_S)
            except TimeoutError:
                return self.lost(seat, incarnation, f"no answer for {_SILENT_S:g} s")
            except RayError as error:
                return self.lost(seat, incarnation, first_line(error))
        ended.cancel()

    def lost(self, seat: Seat, incarnation: str, why: str) -> None:
        """This life of the seat's actor is over."""
        if not seat.serving or seat.incarnation != incarnation:
            return  # it was ended on purpose, or its successor is on the way
        log.error("member lost actor=%s reason=%s", seat.name, why)
        seat.serving = False
        self._fleet.failovers += 1
        self._fleet.tell()
        self.replace(seat)

    def replace(self, seat: Seat) -> None:
        """Puts an actor into a seat that has none that serves, however often it takes."""
        self._spawn(self._replace(seat))

    async def _replace(self, seat: Seat) -> None:
        fleet, backoff_s = self._fleet, _BACKOFF_S
        await self._close_ranks()
        while fleet.attention.get(seat.number) is seat or fleet.experts.get(seat.number) is seat:
            try:
                await fleet.bring_up(seat, dict(fleet.holdings.slots.get(seat.number, {})))
                await fleet.join([seat])
            except Exception as error:
                log.error("not replaced yet actor=%s reason=%s", seat.name, first_line(error))
                seat.serving = False
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)
            else:
                log.info("member back actor=%s epoch=%d", seat.name, fleet.epoch)
                return self.watch(seat)

    async def _close_ranks(self) -> None:
        """A collective goes on among those that live, if they hold all experts. Sockets need no such step."""
        if self._fleet.config.transport_kind == "all_to_all":
            with suppress(Unservable, GroupBroken, RayError):
                await self._fleet.republish()

    async def slot_lost(self, slot: int, incarnation: str, reason: str) -> None:
        """p2p: an attention actor has given up this life of a slot's server."""
        seat = self._fleet.experts.get(slot)
        if seat is None or not seat.serving or seat.address is None or seat.address.incarnation != incarnation:
            return
        if incarnation in self._doubted:
            return
        self._doubted.add(incarnation)
        try:
            if not await self._answers(seat):
                return self.lost(seat, seat.incarnation, reason)
            # It lives, and the way to it may too: they shall try again, less and less often.
            self._returns[slot] += 1
            await asyncio.sleep(min(_BACKOFF_S * 2 ** min(self._returns[slot] - 1, 6), _LONGEST_BACKOFF_S))
        finally:
            self._doubted.discard(incarnation)
        if seat.serving:
            await self._fleet.republish()

    async def group_broken(self) -> None:
        """Collective: a member's group broke. Whoever does not answer is lost; the others form the next group."""
        if self._regrouping:
            return
        self._regrouping = True
        try:
            backoff_s = _BACKOFF_S
            while True:
                seats = [seat for seat in self._fleet.seats() if seat.serving]
                answers = await asyncio.gather(*(self._answers(seat) for seat in seats))
                silent = [seat for seat, answer in zip(seats, answers, strict=True) if not answer]
                for seat in silent:
                    self.lost(seat, seat.incarnation, "no answer after the group broke")
                if silent:
                    return  # replacing them forms the group
                try:
                    return await self._fleet.republish()
                except (Unservable, GroupBroken, RayError) as error:
                    log.warning("no group yet reason=%s", first_line(error))
                    await asyncio.sleep(backoff_s)
                    backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)
        finally:
            self._regrouping = False

    async def _answers(self, seat: Seat) -> bool:
        try:
            await asyncio.wait_for(seat.handle.report.remote(), _ANSWER_S)
        except (TimeoutError, RayError):
            return False
        return True


async def _reason(ended: Any) -> str:
    try:
        await ended
    except RayError as error:
        return first_line(error)
    return "left"
