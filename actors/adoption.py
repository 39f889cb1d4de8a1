"""How a controller that comes back takes over the actors that live, without troubling them.

What it has to know was published before it died: the newest layout that an attention actor has is the one in force.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import TypeVar

import ray
from ray.actor import ActorHandle

from actors.fleet import Fleet
from actors.reports import AttentionReport, ExpertReport
from actors.seats import Role, Seat, find_actors, find_seat, role_config
from dispatch.epoch import Epoch
from dispatch.topology import Topology

log = logging.getLogger("herder")

_ANSWER_S = 5.0
Report = TypeVar("Report", AttentionReport, ExpertReport)
Found = list[tuple[ActorHandle, Report]]


async def adopt(fleet: Fleet) -> list[Seat]:
    """Fills the fleet with the actors that take part; returns the seats whose actors do not.

    Actors that do not belong to the layout, such as those of a change that was under way, are ended.
    """
    attention: Found[AttentionReport] = await _ask("attention", AttentionReport)
    experts: Found[ExpertReport] = await _ask("expert", ExpertReport)
    told = [(report.view, report.layout) for _, report in attention if report.view is not None]
    view, layout = max(told, key=lambda news: news[0].expert_map.epoch, default=(None, None))
    ranks: Iterable[int] = range(role_config(fleet.config, "attention").actors)
    if view is not None and layout is not None:
        fleet.epoch, fleet.holdings, ranks = view.expert_map.epoch, layout.holdings, layout.ranks
    fleet.attention = await _seats("attention", ranks)
    fleet.experts = await _seats("expert", fleet.holdings.slots)
    for actor, report in attention:
        _take(fleet.attention, actor, report, belongs=report.view is not None)
    if isinstance(view, Topology):
        fleet.secret = view.secret
    for actor, expert_report in experts:
        _take(fleet.experts, actor, expert_report, belongs=_takes_part(expert_report, view))
    fleet.draining = any(report.load is not None and report.load.draining for _, report in attention)
    return [seat for seat in fleet.seats() if not seat.serving]


def _takes_part(report: ExpertReport, view: Topology | Epoch | None) -> bool:
    slot = report.status.rank_or_slot
    if isinstance(view, Topology):
        address = view.addresses.get(slot)
        return address is not None and address == report.address
    return view is not None and slot in view.world.slots


async def _ask(role: Role, kind: type[Report]) -> Found[Report]:
    """The actors of a role that answer. The others cannot be told from dead ones: they are replaced."""
    found = await asyncio.to_thread(find_actors, role)
    actors = [actor for same_number in found.values() for actor in same_number]
    answers = await asyncio.gather(
        *(asyncio.wait_for(actor.report.remote(), _ANSWER_S) for actor in actors), return_exceptions=True
    )
    answering = []
    for actor, answer in zip(actors, answers, strict=True):
        if isinstance(answer, kind):
            answering.append((actor, answer))
        else:
            log.warning("no answer role=%s reason=%s", role, answer)
            ray.kill(actor)
    return answering


async def _seats(role: Role, numbers: Iterable[int]) -> dict[int, Seat]:
    seats = {}
    for number in sorted(numbers):
        seat = await find_seat(role, number)
        if seat is None:
            log.error("no reservation actor=%s-%d", role, number)
        else:
            seats[number] = seat
    return seats


def _take(seats: dict[int, Seat], actor: ActorHandle, report: AttentionReport | ExpertReport, belongs: bool) -> None:
    seat = seats.get(report.status.rank_or_slot)
    if seat is None or seat.serving or not belongs or report.status.state != "serving":
        log.warning(
            "ending an actor that does not take part actor=%s state=%s", report.status.name, report.status.state
        )
        ray.kill(actor)
        return
    seat.actor, seat.serving = actor, True
    seat.note(report)
