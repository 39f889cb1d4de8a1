"""Attention of single rows over KV pages by torch's own operations, for any device and dtype.

Rows attend in groups of similar length: their pages are gathered and padded to the longest of the group.

Shapes: T rows of the step, B rows of a group, P pages, L keys, H query heads, K key/value heads, G = H / K, E head
width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llama4.kv_pages import KVPages, Window

SMALL_GROUP_PAGES = 8  # sequences up to this many pages share one group
GATHER_BYTES = 16 << 20  # a group's gathered pages stay within this, so that they are still in cache when they are read


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows that attend as one padded batch.

    `rows_B`: which rows of the step. `pages_N`: B * P page ids. `keys`: the part of the pages in which all rows'
    windows lie. `mask_B11L` is added to the scores of these keys: 0 inside a row's window, else -inf; None if every
    window is all of them.
    """

    rows_B: Tensor
    pages_N: Tensor
    keys: slice
    mask_B11L: Tensor | None

    @classmethod
    def of(cls, members: Sequence[Window], dtype: torch.dtype, device: torch.device) -> DecodeGroup:
        """Pads to the most pages; masks get `dtype`, that of the queries."""
        width = max(len(window.pages) for window in members)
        page_ids: list[int] = []
        for window in members:
            # Padding repeats a page of the row's own: it is masked, and any page will do.
            page_ids += [*window.pages, *[window.pages[0]] * (width - len(window.pages))]
        starts_B = torch.tensor([window.first for window in members])
        stops_B = starts_B + torch.tensor([window.keys for window in members])
        first, stop = int(starts_B.min()), int(stops_B.max())
        places_L = torch.arange(first, stop)
        outside_BL = (places_L < starts_B[:, None]) | (places_L >= stops_B[:, None])
        mask_BL = torch.zeros(outside_BL.shape, dtype=dtype).masked_fill_(outside_BL, -math.inf)
        return cls(
            rows_B=torch.tensor([window.row for window in members]).to(device),
            pages_N=torch.tensor(page_ids).to(device),
            keys=slice(first, stop),
            mask_B11L=mask_BL[:, None, None].to(device) if outside_BL.any() else None,
        )


@dataclass(frozen=True, slots=True)
class GatheredDecode:
    """The single rows of a step for the layers of one kind."""

    groups: tuple[DecodeGroup, ...]

    @classmethod
    def of(cls, windows: Sequence[Window], page_bytes: int, dtype: torch.dtype, device: torch.device) -> GatheredDecode:
        """Groups of like page counts (powers of two) within GATHER_BYTES."""
        buckets: dict[int, list[Window]] = {}
        for window in windows:
            size = max(SMALL_GROUP_PAGES, 1 << (len(window.pages) - 1).bit_length())
            buckets.setdefault(size, []).append(window)
        groups: list[DecodeGroup] = []
        for size, members in sorted(buckets.items()):
            count = max(1, GATHER_BYTES // (page_bytes * size))
            groups += [DecodeGroup.of(members[i : i + count], dtype, device) for i in range(0, len(members), count)]
        return cls(tuple(groups))

    def attend(self, layer: int, q_THE: Tensor, kv: KVPages, out_THE: Tensor) -> None:
        """Writes the weighted values of these rows."""
        for group in self.groups:
            out_THE[group.rows_B] = _attend(layer, q_THE[group.rows_B], group, kv)


def _attend(layer: int, q_BHE: Tensor, group: DecodeGroup, kv: KVPages) -> Tensor:
    """The G query heads of a key/value head pose as G queries, so keys are read once."""
    kv_BP2KE = kv.gather(layer, group.pages_N)
    rows, (kv_heads, head_dim) = q_BHE.shape[0], kv_BP2KE.shape[2:]
    kv_BL2KE = kv_BP2KE.view(rows, -1, 2, kv_heads, head_dim)[:, group.keys]
    k_BKLE, v_BKLE = kv_BL2KE.permute(2, 0, 3, 1, 4)
    q_BKGE = q_BHE.view(rows, kv_heads, -1, head_dim)
    return F.scaled_dot_product_attention(q_BKGE, k_BKLE, v_BKLE, attn_mask=group.mask_B11L).flatten(1, 2)
