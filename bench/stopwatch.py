"""Times functions of the engine and the network from outside, so that these need no hooks for it."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch


class Stopwatch:
    """Sums by label, of seconds or of whatever else is counted. For one thread."""

    def __init__(self) -> None:
        self.totals: dict[str, float] = defaultdict(float)
        self._stack = ExitStack()

    def time(self, owner: object, name: str, label: str) -> None:
        """From now on, the seconds in `owner.name`, a class's method or a module's function, are added up."""

        def timed(call: Callable[..., Any], *arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                self.totals[label] += time.perf_counter() - start

        self._replace(owner, name, timed)

    def count(self, owner: object, name: str, label: str, amount: Callable[..., float]) -> None:
        """From now on, `amount` of the arguments of each call of `owner.name` is added up."""

        def counted(call: Callable[..., Any], *arguments: Any) -> Any:
            self.totals[label] += amount(*arguments)
            return call(*arguments)

        self._replace(owner, name, counted)

    def _replace(self, owner: object, name: str, around: Callable[..., Any]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def replacement(*arguments: Any) -> Any:
            return around(original, *arguments)

        self._stack.enter_context(patch.object(owner, name, replacement))

    def close(self) -> None:
        """Puts the originals back."""
        self._stack.close()


@contextmanager
def stopwatch() -> Iterator[Stopwatch]:
    watch = Stopwatch()
    try:
        yield watch
    finally:
        watch.close()
