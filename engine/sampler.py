"""From logits to tokens.

Randomness is counter-based: the uniform number that picks a token depends on the request's seed and the token's
position alone, and everything else happens row by row. So a request gives the same tokens whatever else is in the batch
and whichever actor runs it.

N rows to sample, M rows of them, V vocabulary, K most likely tokens, W words of a mask (see engine.bitmask).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.bitmask import apply_masks
from engine.penalties import Penalties, apply_penalties
from engine.request import SamplingParams, TokenLogprob

_LEAST_TEMPERATURE = 1e-6  # below, float32 overflows, and the most likely token comes anyhow
# Sorting a vocabulary takes longer than all the rest. So filters look at this many most likely tokens first. Where more
# are left, whole distributions are drawn from until a token comes that passes (at top-p 0.9, nine draws in ten do).
_TOP = 256
_TRIES = 8  # only then is the vocabulary sorted


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row of logits to sample from: `position` is where the new token will stand in its sequence.

    `forbidden`: token ids that may not come yet (min_tokens). `mask_W`: what a grammar lets through. If it lets
    through forbidden tokens only, they may come.
    """

    params: SamplingParams
    seed: int
    position: int
    forbidden: tuple[int, ...] = ()
    penalties: Penalties | None = None
    mask_W: Tensor | None = None


def uniform(seed: int, position: int, attempt: int = 0) -> float:
    """A number in [0, 1) that depends on its arguments alone (53 bits of BLAKE2b)."""
    key = seed.to_bytes(8, "little", signed=True) + position.to_bytes(8, "little") + attempt.to_bytes(8, "little")
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 11) / 2**53


def sample(logits_NV: Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """One token id for each row of float32 logits, which stay as they are."""
    logits_NV = _adjusted(logits_NV, rows)
    drawn = [n for n, row in enumerate(rows) if row.params.temperature > 0]
    if len(drawn) < len(rows):
        tokens_N = logits_NV.argmax(dim=-1)
    else:
        tokens_N = torch.empty(len(rows), dtype=torch.int64, device=logits_NV.device)
    # Which path a row takes depends on the row only: two paths may round differently.
    for draw, chosen in (
        (_draw, [n for n in drawn if not _is_filtered(rows[n].params)]),
        (_draw_filtered, [n for n in drawn if _is_filtered(rows[n].params)]),
    ):
        if chosen:
            index_M, chosen_rows = torch.tensor(chosen, device=logits_NV.device), [rows[n] for n in chosen]
            logits_MV = logits_NV[index_M]
            logits_MV /= _column(chosen_rows, lambda row: max(row.params.temperature, _LEAST_TEMPERATURE), logits_MV)
            tokens_N[index_M] = draw(torch.softmax(logits_MV, dim=-1), chosen_rows)
    return tokens_N.tolist()


def _adjusted(logits_NV: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """The logits with biases, penalties and what may not come; the same tensor if nothing changes."""
    penalised = [(n, row.penalties) for n, row in enumerate(rows) if row.penalties is not None]
    forbidden = [(n, token) for n, row in enumerate(rows) if row.mask_W is None for token in row.forbidden]
    masked = [(n, _mask(row.mask_W, row.forbidden)) for n, row in enumerate(rows) if row.mask_W is not None]
    if penalised or forbidden or masked:
        logits_NV = logits_NV.clone(memory_format=torch.contiguous_format)
    if penalised:
        apply_penalties(logits_NV, penalised)
    if forbidden:
        index = torch.tensor(forbidden, device=logits_NV.device)
        logits_NV[index[:, 0], index[:, 1]] = float("-inf")
    if masked:
        index_M = torch.tensor([n for n, _ in masked], device=logits_NV.device)
        logits_NV[index_M] = apply_masks(logits_NV[index_M], torch.stack([mask_W for _, mask_W in masked]))
    return logits_NV


def _mask(mask_W: Tensor, forbidden: Sequence[int]) -> Tensor:
    """The mask without the forbidden tokens, unless nothing else is left."""
    if not forbidden:
        return mask_W
    rest_W = mask_W.clone()
    words = rest_W.numpy().view("uint32")
    for token in forbidden:
        words[token // 32] &= ~(1 << token % 32) & 0xFFFFFFFF
    return rest_W if words.any() else mask_W


def _is_filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _column(
    rows: Sequence[SampleRow], value: Callable[[SampleRow], float], like: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """A value for each row [M, 1], on the device of `like` and by default of its type."""
    return torch.tensor([[value(row)] for row in rows], dtype=dtype or like.dtype, device=like.device)


def _draw(probs_MK: Tensor, rows: Sequence[SampleRow], attempt: int = 0) -> Tensor:
    """Inverse-CDF sampling: the place at which the cumulative (unnormalised) probability passes the uniform number."""
    cdf_MK = probs_MK.cumsum(dim=-1)
    total_M1 = cdf_MK[:, -1:]
    target_M1 = _column(rows, lambda row: uniform(row.seed, row.position, attempt), cdf_MK) * total_M1
    # Below the total even after rounding, so that the place is one at which the sum grows: of a probability above 0.
    target_M1 = torch.minimum(target_M1, torch.nextafter(total_M1, torch.zeros_like(total_M1)))
    return torch.searchsorted(cdf_MK, target_M1, right=True).squeeze(1)


def _draw_filtered(probs_MV: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """`_draw` from what top-k, top-p and min-p leave."""
    top_MK, ids_MK = probs_MV.topk(min(_TOP, probs_MV.shape[1]), dim=-1)
    tokens_M = _draw_sorted(top_MK, ids_MK, rows)
    if top_MK.shape[1] == probs_MV.shape[1]:
        return tokens_M
    open_M = torch.nonzero(~_decided(top_MK, rows)).squeeze(1)  # the rows that need another way
    for attempt in range(1, _TRIES + 1):
        if not len(open_M):
            return tokens_M
        left, left_MV = [rows[m] for m in open_M.tolist()], probs_MV[open_M]
        drawn_M = _draw(left_MV, left, attempt)
        tokens_M[open_M] = drawn_M
        open_M = open_M[~_passes(left_MV, drawn_M, left)]
    if len(open_M):
        all_MV, order_MV = probs_MV[open_M].sort(dim=-1, descending=True, stable=True)
        tokens_M[open_M] = _draw_sorted(all_MV, order_MV, [rows[m] for m in open_M.tolist()])
    return tokens_M


def _passes(probs_MV: Tensor, tokens_M: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Whether the filters leave each row's token. Of equally likely ones, those of lower ids come first."""
    vocabulary = probs_MV.shape[1]
    ids_V = torch.arange(vocabulary, device=probs_MV.device)
    prob_M1 = probs_MV.gather(1, tokens_M.unsqueeze(1))
    before_MV = (probs_MV > prob_M1) | ((probs_MV == prob_M1) & (ids_V < tokens_M.unsqueeze(1)))
    pass_M1 = before_MV.sum(dim=-1, keepdim=True) < _column(rows, lambda row: row.params.top_k or vocabulary, probs_MV)
    pass_M1 &= (probs_MV * before_MV).sum(dim=-1, keepdim=True) < _column(rows, lambda row: row.params.top_p, probs_MV)
    most_M1 = probs_MV.amax(dim=-1, keepdim=True)
    pass_M1 &= prob_M1 >= most_M1 * _column(rows, lambda row: row.params.min_p, probs_MV)
    return pass_M1.squeeze(1)


def _decided(top_MK: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Of which rows the filters leave nothing but, at most, these most likely tokens."""
    last = top_MK.shape[1]
    by_k_M1 = _column(rows, lambda row: 0 < row.params.top_k <= last, top_MK, torch.bool)
    # Off (top_p 1) is above every sum.
    top_p_M1 = _column(rows, lambda row: row.params.top_p if row.params.top_p < 1.0 else 2.0, top_MK, torch.float64)
    by_p_M1 = top_MK.double().sum(dim=-1, keepdim=True) >= top_p_M1
    by_min_p_M1 = top_MK[:, -1:] < top_MK[:, :1] * _column(rows, lambda row: row.params.min_p, top_MK)
    return (by_k_M1 | by_p_M1 | by_min_p_M1).squeeze(1)


def _draw_sorted(probs_MK: Tensor, ids_MK: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Filters probabilities in descending order, and draws one of the `ids_MK`."""
    width = probs_MK.shape[1]
    probs_MK = probs_MK.double()
    before_MK = probs_MK.cumsum(dim=-1) - probs_MK
    rank_K = torch.arange(width, device=probs_MK.device)
    keep_MK = rank_K < _column(rows, lambda row: row.params.top_k or width, probs_MK)
    keep_MK &= before_MK < _column(rows, lambda row: row.params.top_p, probs_MK)
    keep_MK &= probs_MK >= probs_MK[:, :1] * _column(rows, lambda row: row.params.min_p, probs_MK)
    keep_MK[:, 0] = True
    return ids_MK.gather(1, _draw(probs_MK * keep_MK, rows).unsqueeze(1)).squeeze(1)


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
