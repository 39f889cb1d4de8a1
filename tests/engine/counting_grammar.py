"""A grammar that counts: a Matcher whose every answer is known beforehand."""

from __future__ import annotations

import torch

from engine.grammar import GrammarError

EOS = 60


class Cycle:
    """Lets through only the token after the last one, from 10 on; with `length` tokens it is complete."""

    def __init__(self, length: int, fail_at: int | None = None, eos_may_follow: bool = False) -> None:
        self.accepted: list[int] = []
        self.length = length
        self.fail_at = fail_at
        self.eos_may_follow = eos_may_follow

    def _allowed(self) -> list[int]:
        following = [10 + len(self.accepted)]
        return [*following, EOS] if self.eos_may_follow and self.accepted else following

    def fill_mask(self, row_W: torch.Tensor) -> None:
        if len(self.accepted) == self.fail_at:
            raise GrammarError("too complex")
        row_W.zero_()
        for token in self._allowed():
            row_W[token // 32] |= 1 << token % 32

    def accept(self, token_id: int) -> None:
        if token_id not in self._allowed():
            raise GrammarError(f"{token_id} may not come")
        self.accepted.append(token_id)

    @property
    def is_done(self) -> bool:
        return len(self.accepted) == self.length
