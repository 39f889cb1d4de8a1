"""How long an engine's steps spend in dispatch and combine, whatever the transport."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from llama4.moe import Dispatcher, Ticket


class TimedDispatcher:
    """A dispatcher as it is, and the seconds spent in it since the start. For one thread; others may read."""

    def __init__(self, dispatcher: Dispatcher, clock: Callable[[], float] = time.perf_counter) -> None:
        self._dispatcher = dispatcher
        self._clock = clock
        self.dispatch_s = 0.0
        self.combine_s = 0.0

    def dispatch(self, x_ND: Tensor, expert_ids_NK: Tensor, layer: int) -> Ticket:
        """See Dispatcher."""
        started = self._clock()
        ticket = self._dispatcher.dispatch(x_ND, expert_ids_NK, layer)
        self.dispatch_s += self._clock() - started
        return ticket

    def combine(self, ticket: Ticket) -> Tensor:
        """See Dispatcher."""
        started = self._clock()
        y_NKD = self._dispatcher.combine(ticket)
        self.combine_s += self._clock() - started
        return y_NKD

    def take_lost(self, num_tokens: int) -> frozenset[int]:
        """See Dispatcher."""
        return self._dispatcher.take_lost(num_tokens)
