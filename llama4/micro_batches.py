"""Micro-batches of one step, computed in turn: while the experts have one's rows, the next one's attention is computed.

Shapes: T tokens, N rows, K experts per token, D model width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from llama4.kv_pages import Batch, InputRows
from llama4.moe import Dispatcher, Flow, Ticket


def in_turn(flows: Sequence[Flow]) -> list[Tensor]:
    """Runs the flows, each from pause to pause, and returns what they return."""
    found: dict[int, Tensor] = {}
    waiting = deque(enumerate(flows))
    while waiting:
        place, flow = waiting.popleft()
        try:
            next(flow)
        except StopIteration as end:
            found[place] = end.value
        else:
            waiting.append((place, flow))
    return [found[place] for place in range(len(flows))]


def halve(batch: Batch) -> tuple[Batch, Batch]:
    """Two batches, as nearly equal in rows as segments can be kept whole and in order; there are two or more."""
    rows = len(batch.token_ids_T)
    assert len(batch.segments) >= 2, "one segment cannot be halved"
    segment = min(range(1, len(batch.segments)), key=lambda n: abs(2 * batch.segments[n].start - rows))
    row = batch.segments[segment].start
    return _part(batch, slice(0, segment), 0, row), _part(batch, slice(segment, None), row, rows)


def _part(batch: Batch, segments: slice, start: int, stop: int) -> Batch:
    return Batch(
        batch.token_ids_T[start:stop],
        batch.positions_T[start:stop],
        tuple(replace(segment, start=segment.start - start) for segment in batch.segments[segments]),
        None if batch.images is None else _images(batch.images, start, stop),
    )


def _images(images: InputRows, start: int, stop: int) -> InputRows:
    inside_N = (images.rows_N >= start) & (images.rows_N < stop)
    return InputRows(images.rows_N[inside_N] - start, images.inputs_ND[inside_N.to(images.inputs_ND.device)])


class MicroBatchDispatcher:
    """The dispatcher of one of several micro-batches, which keeps its lost tokens apart from the others'.

    For dispatchers that count a lost row when its batch is combined.
    """

    def __init__(self, dispatcher: Dispatcher, num_tokens: int) -> None:
        self._dispatcher = dispatcher
        self._num_tokens = num_tokens
        self._lost: frozenset[int] = frozenset()

    def dispatch(self, x_ND: Tensor, expert_ids_NK: Tensor, layer: int) -> Ticket:
        """See Dispatcher."""
        return self._dispatcher.dispatch(x_ND, expert_ids_NK, layer)

    def combine(self, ticket: Ticket) -> Tensor:
        """See Dispatcher."""
        y_NKD = self._dispatcher.combine(ticket)
        self._lost |= self._dispatcher.take_lost(self._num_tokens)
        return y_NKD

    def take_lost(self, num_tokens: int) -> frozenset[int]:
        """See Dispatcher; `num_tokens` are the micro-batch's."""
        assert num_tokens == self._num_tokens, "a step's micro-batch has one number of tokens"
        lost, self._lost = self._lost, frozenset()
        return lost
