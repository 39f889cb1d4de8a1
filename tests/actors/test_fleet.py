from __future__ import annotations

import asyncio
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest

from actors import fleet
from actors.fleet import Fleet
from actors.seats import Seat
from cluster.config import DeploymentConfig
from cluster.holdings import Holdings

HELD = {0: (0,)}


class Process:
    """An expert actor's, as far as a fleet can see: calls take a while, those of higher slots less."""

    def __init__(self, log: list[tuple[str, int]], slot: int, fails_at: tuple[str, int]) -> None:
        log.append(("created", slot))
        self._log = log
        self._slot = slot
        self._fails_at = fails_at

    def __getattr__(self, name: str) -> Any:
        async def remote(*_: object) -> Any:
            await asyncio.sleep(0.02 * (3 - self._slot))
            if (name, self._slot) == self._fails_at:
                raise OSError(name)
            self._log.append((name, self._slot))
            return None

        return SimpleNamespace(remote=remote)


@pytest.fixture
def bring_up(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Three expert actors beside others, of which one may fail in a call: what they did, with their slots."""

    def run(fails_at: tuple[str, int] = ("", 0)) -> list[tuple[str, int]]:
        log: list[tuple[str, int]] = []

        def sit(seat: Seat, config: DeploymentConfig) -> None:
            seat.actor = cast(Any, Process(log, seat.number, fails_at))

        monkeypatch.setattr(fleet, "empty", lambda seat: None)
        monkeypatch.setattr(fleet, "sit", sit)
        monkeypatch.setattr(Seat, "note", lambda seat, report: None)
        config = cast(DeploymentConfig, SimpleNamespace(transport_kind="p2p"))
        seats = [Seat("expert", slot, cast(Any, None), 0) for slot in range(3)]

        async def and_a_while() -> None:
            try:
                await Fleet(config, Holdings({9: HELD})).bring_up_beside(dict.fromkeys(seats, HELD))
            finally:
                log.append(("over", 0))
                await asyncio.sleep(0.3)

        with pytest.raises(OSError, match=fails_at[0]) if fails_at[0] else nullcontext():
            asyncio.run(and_a_while())
        return log

    return run


def test_processes_start_one_by_one_and_load_together(bring_up: Any) -> None:
    log = bring_up()
    assert [entry for entry in log if entry[0] in ("created", "progress")] == [
        (name, slot) for slot in range(3) for name in ("created", "progress")
    ]
    assert log.index(("progress", 1)) < log.index(("load", 0)), "one loads while the next one starts"
    assert sorted(slot for name, slot in log if name == "report") == [0, 1, 2]


@pytest.mark.parametrize("fails_at", [("progress", 0), ("load", 0), ("serve", 1)])
def test_when_one_fails_nothing_is_begun_afterwards(bring_up: Any, fails_at: tuple[str, int]) -> None:
    assert bring_up(fails_at)[-1] == ("over", 0)
