"""From logits to tokens.

Randomness is counter-based: the uniform number that picks a token depends on the request's seed and the token's
position alone, so a request gives the same tokens whatever else is in the batch and whichever actor runs it.

N rows to sample, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.request import SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row of logits to sample from: `position` is where the new token will stand in its sequence."""

    params: SamplingParams
    seed: int
    position: int
    forbidden: tuple[int, ...] = ()  # token ids that may not come yet (min_tokens)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments alone (53 bits of BLAKE2b)."""
    key = seed.to_bytes(8, "little", signed=True) + position.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") / 2**64


def sample(logits_NV: Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """One token id for each row of float32 logits."""
    forbidden = [(n, token) for n, row in enumerate(rows) for token in row.forbidden]
    if forbidden:
        logits_NV = logits_NV.clone()
        index = torch.tensor(forbidden, device=logits_NV.device)
        logits_NV[index[:, 0], index[:, 1]] = float("-inf")
    tokens_N = logits_NV.argmax(dim=-1)
    # Which path a row takes depends on its own parameters only: the two may round differently.
    for filtered in (False, True):
        chosen = [
            n for n, row in enumerate(rows) if row.params.temperature > 0 and _is_filtered(row.params) == filtered
        ]
        if chosen:
            index_M = torch.tensor(chosen, device=logits_NV.device)
            tokens_N[index_M] = _sample_rows(logits_NV[index_M], [rows[n] for n in chosen], filtered)
    return tokens_N.tolist()


def _is_filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _sample_rows(logits_MV: Tensor, rows: list[SampleRow], filtered: bool) -> Tensor:
    """Inverse-CDF sampling: the token at which the cumulative probability passes the row's uniform number."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits_MV.device).unsqueeze(1)

    vocabulary = logits_MV.shape[1]
    probs_MV = torch.softmax(logits_MV.double() / column([row.params.temperature for row in rows]), dim=-1)
    order_MV = None
    if filtered:
        probs_MV, order_MV = probs_MV.sort(dim=-1, descending=True, stable=True)
        before_MV = probs_MV.cumsum(dim=-1) - probs_MV
        rank_V = torch.arange(vocabulary, device=logits_MV.device)
        keep_MV = rank_V < column([row.params.top_k or vocabulary for row in rows])
        keep_MV &= before_MV < column([row.params.top_p for row in rows])
        keep_MV &= probs_MV >= probs_MV[:, :1] * column([row.params.min_p for row in rows])
        keep_MV[:, 0] = True
        probs_MV = probs_MV * keep_MV
    cdf_MV = probs_MV.cumsum(dim=-1)
    target_M1 = column([uniform(row.seed, row.position) for row in rows]) * cdf_MV[:, -1:]
    picked_M1 = torch.searchsorted(cdf_MV, target_M1, right=True)
    # Rounding may put the target at the very end: stay on the last token that has any probability.
    last_M1 = vocabulary - 1 - (probs_MV > 0).flip(-1).int().argmax(dim=-1, keepdim=True)
    picked_M1 = torch.minimum(picked_M1, last_M1)
    return (picked_M1 if order_MV is None else order_MV.gather(1, picked_M1)).squeeze(1)


def token_logprobs(logits_NV: Tensor, token_ids: Sequence[int], alternatives: Sequence[int]) -> list[TokenLogprob]:
    """Log-probability of each row's token, and its `alternatives[n]` most likely ones, of unmodified float32 logits."""
    logprobs_NV = torch.log_softmax(logits_NV, dim=-1)
    index_N1 = torch.tensor(token_ids, device=logits_NV.device).unsqueeze(1)
    chosen = logprobs_NV.gather(1, index_N1).squeeze(1).tolist()
    most = min(max(alternatives, default=0), logits_NV.shape[1])
    top_NA, top_ids_NA = logprobs_NV.topk(most, dim=-1)
    values, ids = top_NA.tolist(), top_ids_NA.tolist()
    return [
        TokenLogprob(token, logprob, tuple(zip(ids[n][:wanted], values[n][:wanted], strict=True)))
        for n, (token, logprob, wanted) in enumerate(zip(token_ids, chosen, alternatives, strict=True))
    ]
