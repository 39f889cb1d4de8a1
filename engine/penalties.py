"""Penalties and biases: what changes a request's logits because of its parameters and the tokens that it has so far.

N rows of logits, V vocabulary, P places (row, token) of the logits that change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.request import SamplingParams

_FIRST_CAPACITY = 64


class Penalties:
    """One request's penalties and biases. What they need of its tokens is counted as the tokens come.

    The biases come first, then the repetition penalty (as in transformers), then frequency and presence (as OpenAI
    defines them).
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int]) -> None:
        self.repetition = params.repetition_penalty
        self.frequency = params.frequency_penalty
        self.presence = params.presence_penalty
        self.bias_ids = np.array([token for token, _ in params.logit_bias], dtype=np.int64)
        self.biases = np.array([bias for _, bias in params.logit_bias], dtype=np.float32)
        # The prompt's tokens matter to the repetition penalty only. Only the counts of generated tokens matter.
        seen = np.unique(np.array(prompt if self.repetition != 1.0 else (), dtype=np.int64))
        self._size = len(seen)
        self._ids = np.concatenate([seen, np.zeros(_FIRST_CAPACITY, dtype=np.int64)])
        self._counts = np.zeros(len(self._ids), dtype=np.float32)
        self._place = {token: place for place, token in enumerate(seen.tolist())}
        self._counting = self.repetition != 1.0 or self.frequency != 0.0 or self.presence != 0.0

    @classmethod
    def of(cls, params: SamplingParams, prompt: Sequence[int], generated: Sequence[int] = ()) -> Self | None:
        """A request's penalties before the token that follows `generated`; None if its logits stay as they are."""
        off = params.repetition_penalty == 1.0 and not (params.frequency_penalty or params.presence_penalty)
        if off and not params.logit_bias:
            return None
        penalties = cls(params, prompt)
        for token in generated:
            penalties.add(token)
        return penalties

    def add(self, token: int) -> None:
        """One more token was generated."""
        if not self._counting:
            return
        place = self._place.setdefault(token, self._size)
        if place == self._size:
            if self._size == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[place] = token
            self._size += 1
        self._counts[place] += 1

    @property
    def ids(self) -> NDArray[np.int64]:
        """The different tokens that are penalised."""
        return self._ids[: self._size]

    @property
    def counts(self) -> NDArray[np.float32]:
        """How often each of `ids` was generated."""
        return self._counts[: self._size]


def apply_penalties(logits_NV: Tensor, rows: Sequence[tuple[int, Penalties]]) -> None:
    """Changes the logits of these rows in place; all rows at once, and each as if it were alone."""
    vocabulary = logits_NV.shape[1]
    flat = logits_NV.view(-1)

    def per_place(values: Sequence[float], sizes: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=np.float32), sizes)).to(flat.device)

    def joined(parts: Sequence[NDArray[np.generic]]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(flat.device)

    biased = [(n, one) for n, one in rows if len(one.bias_ids)]
    if biased:
        places_P = joined([one.bias_ids + n * vocabulary for n, one in biased])
        flat[places_P] += joined([one.biases for _, one in biased])
    counted = [(n, one) for n, one in rows if len(one.ids)]
    if counted:
        sizes = [len(one.ids) for _, one in counted]
        places_P = joined([one.ids + n * vocabulary for n, one in counted])
        counts_P = joined([one.counts for _, one in counted])
        repetition_P = per_place([one.repetition for _, one in counted], sizes)
        logits_P = flat[places_P]
        logits_P = torch.where(logits_P < 0, logits_P * repetition_P, logits_P / repetition_P)
        logits_P -= counts_P * per_place([one.frequency for _, one in counted], sizes)
        logits_P -= (counts_P > 0) * per_place([one.presence for _, one in counted], sizes)
        flat[places_P] = logits_P
