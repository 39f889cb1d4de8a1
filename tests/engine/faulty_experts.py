"""Experts that break or lose rows at scripted places, and the gate that goes with them.

Shape legend: N rows, K experts per row, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dispatch.epoch import GroupBroken
from engine.engine import SoloGate
from llama4.moe import Dispatcher, Ticket


@dataclass(frozen=True)
class Script:
    """`breaks`: the dispatches at which the group breaks. `loses`: which rows of a dispatch find no holder."""

    breaks: frozenset[int] = frozenset()
    loses: Callable[[int, int], bool] = lambda dispatch, row: False


class FaultyExperts:
    """A dispatcher that follows the script. What a broken step has written, or a lost row brings, is nonsense."""

    def __init__(self, script: Script, inner: Dispatcher) -> None:
        self._script = script
        self._inner = inner
        self._lost: set[tuple[int, int]] = set()  # row, rows of its dispatch
        self.dispatched = 0
        self.broken = 0
        self.lost = 0

    def dispatch(self, x_ND: Tensor, expert_ids_NK: Tensor, layer: int) -> Ticket:
        number, self.dispatched = self.dispatched, self.dispatched + 1
        if number in self._script.breaks:
            self.broken += 1
            raise GroupBroken(1, f"dispatch {number}", "scripted")
        return number, x_ND.shape[0], self._inner.dispatch(x_ND, expert_ids_NK, layer)

    def combine(self, ticket: Ticket) -> Tensor:
        number, rows, inner = ticket
        y_NKD = self._inner.combine(inner)
        lost = [row for row in range(rows) if self._script.loses(number, row)]
        self._lost.update((row, rows) for row in lost)
        y_NKD[torch.tensor(lost, dtype=torch.int64)] = 1e3
        return y_NKD

    def take_lost(self, num_tokens: int) -> frozenset[int]:
        lost = frozenset(row * num_tokens // rows for row, rows in self._lost)
        self._lost.clear()
        self.lost += len(lost)
        return lost


class FaultyGate(SoloGate):
    """Recovers from every break. Every third answer says that experts may be back."""

    @dataclass(frozen=True)
    class Answer:
        idle: bool
        leaving: bool
        renewed: bool

    def __init__(self) -> None:
        super().__init__()
        self._begun = 0
        self.recovered = 0

    def begin(self, rows: int, leaving: bool) -> FaultyGate.Answer:
        self._begun += 1
        return self.Answer(rows == 0, leaving, self._begun % 3 == 0)

    def wait(self) -> None:
        self._rung.wait(0.002)  # whoever is parked is tried again soon
        self._rung.clear()

    def recover(self, error: GroupBroken) -> None:
        assert "scripted" in str(error)
        self.recovered += 1
