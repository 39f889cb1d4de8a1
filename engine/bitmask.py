"""Masks of allowed tokens, as grammars fill them, and logits under them.

Shape suffixes: R rows, V vocabulary, W 32-bit words of a mask (bit `i % 32` of word `i // 32` for token id `i`).
"""

from __future__ import annotations

import torch
from torch import Tensor


def allocate_masks(rows: int, vocab_size: int) -> Tensor:
    """Masks [R, W] (int32, on the CPU) that allow everything."""
    return torch.full((rows, (vocab_size + 31) // 32), -1, dtype=torch.int32)


def apply_masks(logits_RV: Tensor, masks_RW: Tensor) -> Tensor:
    """The logits, with minus infinity for what the masks forbid. On the logits' device; both arguments stay."""
    bits = torch.arange(32, device=logits_RV.device, dtype=torch.int32)
    allowed = (masks_RW.to(logits_RV.device).unsqueeze(-1) >> bits) & 1
    allowed_RV = allowed.flatten(1)[:, : logits_RV.shape[1]].bool()
    return logits_RV.masked_fill(~allowed_RV, float("-inf"))
