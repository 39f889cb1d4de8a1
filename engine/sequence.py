"""Requests under way: what the scheduler decides over and a step computes. Pure Python, as the scheduler is."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.pages import PageTable
from engine.request import Request


@dataclass(eq=False, slots=True)
class Sequence:
    """A request under way. KV exists for `tokens[:computed]`; what lies behind it is still to be computed.

    `turn`: its place among the waiting ones; lower is earlier. `admitted`: its number in the order of admission, 0
    before the first one. `cached_tokens`: how many of the prompt's tokens that first one found in the prefix cache.
    `hashes`: see engine.prefix_cache; at least those of the full pages below `computed`.
    """

    request: Request
    tokens: list[int]
    table: PageTable
    turn: tuple[float, int]
    computed: int = 0
    admitted: int = 0
    cached_tokens: int = 0
    hashes: list[bytes] = field(default_factory=list)

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt_token_ids)

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def rank(self) -> tuple[int, int]:
        """Among the running ones: the last in this order gives way first."""
        return self.request.priority, self.admitted


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """`rows` tokens of a sequence, from position `sequence.computed` on.

    `completes`: nothing is pending behind them, so the last row's logits say the next token.
    """

    sequence: Sequence
    rows: int
    completes: bool
