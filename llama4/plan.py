"""Everything about a step's attention that depends on its batch alone, made once per step and shared by all layers.

Rows that come alone (decoding), and on CPUs those of short runs, attend together, by the way that suits the device.
Rows that come in a longer run (prefilling) attend run by run; for chunked layers a run is cut at chunk borders.

Shapes: T rows of the step, P pages, L keys, Q queries of a block, F RoPE frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama4 import openmp
from llama4.config import LayerKind, TextConfig
from llama4.gathered_attention import GatheredDecode
from llama4.kv_pages import Batch, Segment, Window
from llama4.paged_attention import PagedDecode
from llama4.rope import query_temperature, rotation

QUERY_BLOCK = 256  # queries that share one mask
MASK_ELEMENTS = 1 << 22  # a mask's size; longer windows get smaller query blocks, down to MIN_QUERY_BLOCK
MIN_QUERY_BLOCK = 16
FEW_PAIRS = 1 << 16  # queries times keys of a run that costs little to attend row by row


@dataclass(frozen=True, slots=True)
class PrefillRun:
    """Rows start..stop of one request within one attention window.

    `history`: how many keys of the window earlier steps wrote; they start at place `offset` of the pages `pages_P`.
    """

    start: int
    stop: int
    history: int
    pages_P: Tensor
    offset: int


@dataclass(frozen=True, slots=True)
class KindPlan:
    """The plan for the layers of one kind. `written_rows` is None where all rows are written."""

    written_rows: Tensor | None
    slots: Tensor
    decode: PagedDecode | GatheredDecode
    prefill: tuple[PrefillRun, ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A step's plan. `mask_QL` serves all prefill runs that have a history, where torch attends: see `prefill_mask`."""

    kinds: dict[LayerKind, KindPlan]
    rotation_T1F: Tensor
    temperature_T11: Tensor | None
    mask_QL: Tensor

    @property
    def query_block(self) -> int:
        """The largest number of queries that `prefill_mask` serves at a time."""
        return self.mask_QL.shape[0]

    def prefill_mask(self, queries: int, keys: int) -> Tensor:
        """The mask of the last `queries` of `keys` positions: query i sees keys up to keys - queries + i."""
        return self.mask_QL[self.query_block - queries :, self.mask_QL.shape[1] - keys :]


def plan_step(config: TextConfig, batch: Batch, page_size: int, frequencies_F: Tensor, dtype: torch.dtype) -> StepPlan:
    """Plans a step on the device of `frequencies_F`; masks get `dtype`, that of the queries."""
    device = frequencies_F.device
    kinds = {kind: _Planner(config, kind, page_size, dtype, device).plan(batch) for kind in set(config.layer_kinds)}
    positions_T = batch.positions_T.to(device)
    masked = not openmp.suits(dtype, device)
    with_history = [run for plan in kinds.values() for run in plan.prefill if run.history and masked]
    queries = max((run.stop - run.start for run in with_history), default=0)
    keys = max((run.history + run.stop - run.start for run in with_history), default=0)
    if with_history:
        queries = min(queries, QUERY_BLOCK, max(MIN_QUERY_BLOCK, MASK_ELEMENTS // keys))
    return StepPlan(
        kinds=kinds,
        rotation_T1F=rotation(positions_T, frequencies_F),
        temperature_T11=(
            query_temperature(config, positions_T)[:, None, None] if config.attn_temperature_tuning else None
        ),
        mask_QL=_causal_mask(queries, keys, dtype, device),
    )


def _causal_mask(queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    mask_QL = torch.full((queries, keys), -math.inf, dtype=dtype, device=device)
    return mask_QL.triu_(keys - queries + 1) if queries else mask_QL


class _Planner:
    """Plans one layer kind."""

    def __init__(
        self, config: TextConfig, kind: LayerKind, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._config = config
        self._kind = kind
        self._page_size = page_size
        self._dtype = dtype
        self._device = device

    def plan(self, batch: Batch) -> KindPlan:
        windows: list[Window] = []
        runs: list[PrefillRun] = []
        for segment in batch.segments:
            if self._rows_alone(segment):
                windows += [self._window(segment, row) for row in range(segment.length)]
            else:
                runs += self._runs(segment)
        rows: list[int] = []
        slots: list[int] = []
        for segment in batch.segments:
            first = self._first_kept(segment)
            rows.extend(range(segment.start + first, segment.start + segment.length))
            slots.extend(self._slots(segment, first))
        all_rows = len(rows) == batch.token_ids_T.shape[0]
        return KindPlan(
            written_rows=None if all_rows else self._indices(rows),
            slots=self._indices(slots),
            decode=self._decode(windows),
            prefill=tuple(runs),
        )

    def _indices(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self._device)

    def _window_pages(self, segment: Segment, start: int, stop: int) -> list[int]:
        """The ids of the pages that hold the positions start..stop."""
        if start == stop:
            return []
        first, end = start // self._page_size, -(-stop // self._page_size)
        ids = [page for page in segment.pages[self._kind][first:end] if page is not None]
        assert len(ids) == end - first, "a page that is written or read must have an id"
        return ids

    def _first_kept(self, segment: Segment) -> int:
        """The first of the segment's rows that later steps can attend to: those of the last row's chunk are kept."""
        last = segment.position + segment.length - 1
        return max(0, self._config.window_start(self._kind, last) - segment.position)

    def _slots(self, segment: Segment, first: int) -> list[int]:
        size = self._page_size
        start, stop = segment.position + first, segment.position + segment.length
        pages = self._window_pages(segment, start, stop)
        offset = start // size * size
        return [pages[(p - offset) // size] * size + p % size for p in range(start, stop)]

    def _rows_alone(self, segment: Segment) -> bool:
        """Whether each of the segment's rows attends by itself: one that decodes, and on CPUs a short run as well.

        There it makes no difference to any bit of theirs.
        """
        if segment.length == 1:
            return True
        pairs = segment.length * (segment.position + segment.length)
        kept = self._first_kept(segment) == 0  # all keys and values are in pages before anything is read
        return kept and pairs <= FEW_PAIRS and openmp.suits(self._dtype, self._device)

    def _window(self, segment: Segment, row: int) -> Window:
        position = segment.position + row
        start = self._config.window_start(self._kind, position)
        pages = self._window_pages(segment, start, position + 1)
        return Window(segment.start + row, pages, start % self._page_size, position + 1 - start)

    def _decode(self, windows: Sequence[Window]) -> PagedDecode | GatheredDecode:
        if openmp.suits(self._dtype, self._device):
            return PagedDecode.of(windows, self._page_size)
        token_bytes = 2 * self._config.num_key_value_heads * self._config.head_dim * self._dtype.itemsize
        return GatheredDecode.of(windows, token_bytes * self._page_size, self._dtype, self._device)

    def _runs(self, segment: Segment) -> list[PrefillRun]:
        runs = []
        position, end = segment.position, segment.position + segment.length
        while position < end:
            start = self._config.window_start(self._kind, position)
            stop = end
            if self._kind == "chunked":
                assert self._config.attention_chunk_size is not None
                stop = min(end, start + self._config.attention_chunk_size)
            runs.append(
                PrefillRun(
                    start=segment.start + position - segment.position,
                    stop=segment.start + stop - segment.position,
                    history=position - start,
                    pages_P=self._indices(self._window_pages(segment, start, position)),
                    offset=start % self._page_size,
                )
            )
            position = stop
        return runs
