"""When requests with images may begin, so that a burst of them does not slow down the streams that are under way.

Handling an image takes many times the work of a token: its file, its encoding, its prompt's many tokens. Where streams
of text share a processor with any of that, all images at once multiply their time per token; spread out, they take
what is free. How much that is depends on the machine, so it is measured: while images wait, they begin faster and
faster until the streams are slower than usual by more than `slowdown`, then more slowly (additive increase and
multiplicative decrease would converge too late: both are factors). An image's cost shows only when it has begun, so
each time some begin too soon; for these the streams get their time back before the next ones. Without streams, nothing
waits.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

_TICK_S = 0.25  # between two looks at the streams
_LEAST, _MOST = 0.5, 1000.0  # images a second
_AT_FIRST = 2.0
_FASTER, _SLOWER = 1.25, 0.55
_QUIET_S = 1.0  # without an image: the streams are as usual
_LEARNT = 0.1  # weight of a tick in what is usual
_FORGOTTEN_S = 400.0  # under images without end, what is usual grows by a factor e in this time
_DEBT_S = 2.0  # the longest time that streams get back


class TextStream:
    """The tokens of one answer, as they come."""

    def __init__(self, pace: ImagePace) -> None:
        self._pace = pace
        self._at: float | None = None

    def take(self, tokens: int) -> None:
        """So many have come."""
        now = self._pace.clock()
        if self._at is not None and tokens:
            self._pace.saw(now - self._at, tokens)
        self._at = now


class ImagePace:
    """Gives turns, first come, first served. One per gateway replica.

    Args:
        slowdown: by which part images may raise the streams' time per token; None: images never wait.
    """

    def __init__(
        self,
        slowdown: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.clock = clock
        self._sleep = sleep
        self.rate = _AT_FIRST
        self.on_turn: Callable[[float], None] = lambda seconds: None  # told how long each turn was waited for
        self._slowdown = slowdown
        self._order = asyncio.Lock()
        self._waiting = 0
        self._streams = 0
        self._usual: float | None = None  # seconds per token
        self._debt_s = 0.0  # by how much the streams are later than they may be
        self._seconds, self._tokens = 0.0, 0  # of the streams, since the tick began
        self._tick = self._last_turn = clock() - _QUIET_S

    @contextmanager
    def stream(self) -> Iterator[TextStream]:
        """An answer to a request without images is under way."""
        self._streams += 1
        try:
            yield TextStream(self)
        finally:
            self._streams -= 1

    async def turn(self) -> None:
        """Returns when a request with images may begin."""
        if self._slowdown is None:
            return
        came = self.clock()
        self._waiting += 1
        try:
            async with self._order:
                while self._streams and (left := self._last_turn + self._between() - self.clock()) > 0:
                    await self._sleep(min(left, _TICK_S))  # the rate may have changed by then
                self._last_turn = self.clock()
                self.on_turn(self._last_turn - came)
        finally:
            self._waiting -= 1

    def _between(self) -> float:
        """Seconds from one turn to the next."""
        return 1 / (_LEAST if self._debt_s > 0 else self.rate)

    def saw(self, seconds: float, tokens: int) -> None:
        """A stream's next tokens took so long."""
        if self._slowdown is None:
            return
        self._seconds += seconds
        self._tokens += tokens
        now = self.clock()
        if now - self._tick >= _TICK_S:
            self._adjust(self._seconds / self._tokens, self._slowdown, now)
            self._tick, self._seconds, self._tokens = now, 0.0, 0

    def _adjust(self, per_token: float, slowdown: float, now: float) -> None:
        if self._usual is None:
            self._usual = per_token
        if not self._waiting and now - self._last_turn >= _QUIET_S:
            self._usual += _LEARNT * (per_token - self._usual)
            self._debt_s = 0.0
            return
        elapsed, allowed = now - self._tick, self._usual * (1 + slowdown)
        self._debt_s = min(max(self._debt_s + elapsed * (per_token / allowed - 1), 0.0), _DEBT_S)
        if per_token > allowed:
            self.rate = max(_LEAST, self.rate * _SLOWER)
        elif self._waiting and not self._debt_s:
            self.rate = min(_MOST, self.rate * _FASTER)
        self._usual *= 1 + min(1.0, elapsed / _FORGOTTEN_S)
