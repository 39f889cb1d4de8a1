from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from actors import fleet
from actors.fleet import Fleet
from actors.seats import Seat
from cluster.config import DeploymentConfig
from cluster.holdings import Holdings


class Process:
    """An expert actor's, as far as a fleet can see: calls take a while, those of higher slots less."""

    def __init__(self, log: list[tuple[str, int]], slot: int) -> None:
        self._log = log
        self._slot = slot

    def __getattr__(self, name: str) -> Any:
        async def remote(*_: object) -> Any:
            self._log.append((f"{name} called", self._slot))
            await asyncio.sleep(0.02 * (3 - self._slot))
            self._log.append((name, self._slot))
            return None

        return SimpleNamespace(remote=remote)


def test_beside_those_that_serve_processes_start_one_by_one_and_load_together(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[str, int]] = []
    told: list[int] = []
    monkeypatch.setattr(fleet, "empty", lambda seat: None)
    monkeypatch.setattr(fleet, "sit", lambda seat, config: setattr(seat, "actor", Process(log, seat.number)))
    monkeypatch.setattr(Seat, "note", lambda seat, report: told.append(seat.number))
    config = cast(DeploymentConfig, SimpleNamespace(transport_kind="p2p"))
    seats = [Seat("expert", slot, cast(Any, None), 0) for slot in range(3)]

    held = {0: (0,)}
    asyncio.run(Fleet(config, Holdings({9: held})).bring_up_beside(dict.fromkeys(seats, held)))

    assert [entry for entry in log if "progress" in entry[0]] == [
        (name, slot) for slot in range(3) for name in ("progress called", "progress")
    ]
    first_loaded = next(place for place, entry in enumerate(log) if entry[0] == "load")
    assert ("progress", 1) in log[:first_loaded], "one loads while the next one starts"
    assert sorted(told) == [0, 1, 2]
