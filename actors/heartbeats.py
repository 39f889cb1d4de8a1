"""Who has said that it lives, and who has fallen silent."""

from __future__ import annotations

import time
from collections.abc import Callable


class Heartbeats:
    """Senders that have not been heard for `limit_s` seconds in which they could have been.

    Whoever stands still hears nobody: when `silent` comes late, because this process or its whole machine was held up,
    that time does not count.
    """

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.interval_s = limit_s / 4  # between calls of `silent`
        self._limit_s = limit_s
        self._clock = clock
        self._heard: dict[str, float] = {}
        self._looked: float | None = None

    def hear(self, sender: str) -> None:
        """It lives."""
        self._heard[sender] = self._clock()

    def expect(self, sender: str) -> None:
        """It is going to be heard of, if it has not been yet."""
        self._heard.setdefault(sender, self._clock())

    def silent(self) -> list[str]:
        """Those that have fallen silent; they are forgotten. To be called every `interval_s`."""
        now = self._clock()
        held_up_s = 0.0 if self._looked is None else max(0.0, now - self._looked - self.interval_s)
        self._looked = now
        for sender in self._heard:
            self._heard[sender] += held_up_s
        silent = [sender for sender, at in self._heard.items() if now - at > self._limit_s]
        for sender in silent:
            del self._heard[sender]
        return silent
