"""Who falls silent is told once; time in which nobody could have been heard does not count."""

from __future__ import annotations

from actors.heartbeats import Heartbeats


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def look_for(heartbeats: Heartbeats, clock: Clock, seconds: float, *living: str) -> list[str]:
    """Those that fall silent while so many seconds pass and `living` are heard."""
    silent = []
    for _ in range(round(seconds / heartbeats.interval_s)):
        clock.now += heartbeats.interval_s
        for sender in living:
            heartbeats.hear(sender)
        silent += heartbeats.silent()
    return silent


def test_who_is_not_heard_is_silent_once() -> None:
    clock = Clock()
    heartbeats = Heartbeats(8.0, clock)
    heartbeats.hear("a")
    heartbeats.expect("b")
    assert look_for(heartbeats, clock, 8, "c") == []
    assert look_for(heartbeats, clock, 2, "c") == ["a", "b"]
    assert look_for(heartbeats, clock, 20, "c") == []


def test_to_be_expected_is_not_to_be_heard() -> None:
    clock = Clock()
    heartbeats = Heartbeats(8.0, clock)
    heartbeats.expect("a")
    assert look_for(heartbeats, clock, 6) == []
    heartbeats.expect("a")
    assert look_for(heartbeats, clock, 4) == ["a"]


def test_time_in_which_nobody_was_looking_does_not_count() -> None:
    clock = Clock()
    heartbeats = Heartbeats(8.0, clock)
    heartbeats.hear("a")
    assert look_for(heartbeats, clock, 2) == []
    clock.now += 1000  # this process stood still
    assert look_for(heartbeats, clock, 6) == []
    assert look_for(heartbeats, clock, 2) == ["a"]
