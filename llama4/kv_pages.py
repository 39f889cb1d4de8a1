"""Keys and values in pages, and the batches of rows that read and write them.

Shapes: T rows of a step, N page ids or image rows, D model width, Hkv key/value heads, Dh head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama4.config import LayerKind, TextConfig
from llama4.memory import zeros


@dataclass(frozen=True, slots=True)
class Segment:
    """One request's consecutive rows of a step.

    `start`: its first row in the batch. `length`: how many rows (1 or more). `position`: its first row's position in
    the sequence. `pages`: for each layer kind its page ids by absolute page index: page i holds the positions from
    i * page_size on; up to the page of the last row at least. For "chunked" layers only two stretches are touched, and
    entries outside of them may be None: from the border of the first row's chunk up to `position` (read), and from the
    border of the last row's chunk, or `position` if that is later, up to the last row (written).
    """

    start: int
    length: int
    position: int
    pages: Mapping[LayerKind, Sequence[int | None]]


@dataclass(frozen=True, slots=True)
class InputRows:
    """Rows of a step that enter the first layer as vectors of their own, not as their token's embedding: image patches.

    `rows_N`: which rows of the step, each at most once. `inputs_ND`: what they enter as, of any dtype, on any device.
    """

    rows_N: Tensor
    inputs_ND: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one step: any mixture of requests that prefill, wholly or in part, and that decode; or none."""

    token_ids_T: Tensor
    positions_T: Tensor
    segments: tuple[Segment, ...]
    images: InputRows | None = None

    @classmethod
    def of(cls, token_ids: Sequence[int], segments: Sequence[Segment], images: InputRows | None = None) -> Batch:
        """Derives the positions; the segments cover all rows in order."""
        positions: list[int] = []
        for segment in segments:
            assert segment.start == len(positions) and segment.length >= 1, "segments must cover the rows in order"
            positions.extend(range(segment.position, segment.position + segment.length))
        assert len(positions) == len(token_ids), "segments must cover all rows"
        return cls(
            torch.tensor(token_ids, dtype=torch.int64),
            torch.tensor(positions, dtype=torch.int64),
            tuple(segments),
            images,
        )


@dataclass(frozen=True, slots=True)
class Window:
    """What a row that comes alone attends to: `keys` positions, from place `first` of the first page on.

    `row`: which row of the step. `pages`: the ids of all pages that hold them.
    """

    row: int
    pages: Sequence[int]
    first: int
    keys: int


class KVPages:
    """The KV pools of all layers: per layer one tensor [pages of its kind, page_size, 2, Hkv, Dh].

    A token's key and value lie next to each other, so that a page is one contiguous block: a step's rows are written
    with one scatter per layer, and pages are gathered by copying whole blocks. All layers share one gather buffer: a
    fresh one per layer costs more in page faults than the copy itself (measured above 32 MB: 5 times as much).
    """

    def __init__(
        self,
        config: TextConfig,
        page_size: int,
        pages: Mapping[LayerKind, int],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.page_size = page_size
        self._page_shape = (page_size, 2, config.num_key_value_heads, config.head_dim)
        # Zeros, not garbage: rows that were never written are gathered too, and a masked NaN is still a NaN.
        self._pools = [zeros((pages[kind], *self._page_shape), dtype, device) for kind in config.layer_kinds]
        self._gathered = torch.empty((0, *self._page_shape), dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        """The size of all pools."""
        return sum(pool.nbytes for pool in self._pools)

    def take_memory(self) -> None:
        """Makes the system give all of it now, so that a lack of it shows at the start and not under load."""
        for pool in self._pools:
            pool.zero_()

    def pool(self, layer: int) -> Tensor:
        """A layer's pages [pages of its kind, page_size, 2, Hkv, Dh]."""
        return self._pools[layer]

    def write(self, layer: int, slots_T: Tensor, kv_T2HD: Tensor) -> None:
        """Stores rows of keys and values; slot = page id * page_size + place in the page."""
        self._pools[layer].view(-1, *self._page_shape[1:]).index_copy_(0, slots_T, kv_T2HD)

    def gather(self, layer: int, page_ids_N: Tensor) -> Tensor:
        """The pages' content [N * page_size, 2, Hkv, Dh], valid until the next call."""
        n, pool = page_ids_N.shape[0], self._pools[layer]
        if self._gathered.shape[0] < n:
            with torch.inference_mode(False):  # usable in both modes, whichever this first call is in
                self._gathered = torch.empty((n, *self._page_shape), dtype=pool.dtype, device=pool.device)
        out = self._gathered[:n]
        torch.index_select(pool, 0, page_ids_N, out=out)
        return out.view(-1, *self._page_shape[1:])
