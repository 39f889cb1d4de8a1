"""Which KV pages are whose. Page ids only: the tensors are llama4.kv_pages.KVPages.

A page holds `page_size` consecutive positions of one sequence, for all layers of one kind. Full-attention layers need
every position of a sequence; chunked layers only those of the chunk that the next position lies in, so their older
pages go back to the pool as soon as the chunk is past.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

LayerKind: TypeAlias = Literal["full", "chunked"]  # llama4.config's, which would bring torch


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """The layers of one kind: `pages` in their pool; `chunk_size` positions are kept, None for all."""

    pages: int
    chunk_size: int | None = None

    def first_needed(self, position: int) -> int:
        """The first position that a token at `position` attends to."""
        return 0 if self.chunk_size is None else position - position % self.chunk_size


class PagePool:
    """The free pages of one layer group, last freed first used (its memory is the warmest)."""

    def __init__(self, pages: int) -> None:
        self.total = pages
        self._free = list(range(pages - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        assert count <= len(self._free), "the scheduler checks for room first"
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return taken[::-1]

    def give_back(self, pages: Sequence[int]) -> None:
        self._free.extend(pages)
        assert len(self._free) <= self.total, "a page was freed twice"


@dataclass(slots=True)
class PageTable:
    """One sequence's pages in each layer group, by absolute page index; None where a past chunk's page was freed."""

    pages: dict[LayerKind, list[int | None]] = field(default_factory=dict)


class PageAllocator:
    """Gives pages to sequences and takes them back, for all layer groups at once."""

    def __init__(self, groups: dict[LayerKind, LayerGroup], page_size: int) -> None:
        self.page_size = page_size
        self.groups = groups
        self.pools = {kind: PagePool(group.pages) for kind, group in groups.items()}

    def new_table(self) -> PageTable:
        return PageTable({kind: [] for kind in self.groups})

    def longest_sequence(self) -> int:
        """How many positions one sequence can hold when it has all pages to itself.

        A chunked group bounds a sequence only where it cannot hold one chunk (a page may straddle the border).
        """
        bounds = []
        for group in self.groups.values():
            positions = group.pages * self.page_size
            if group.chunk_size is None or positions < group.chunk_size + self.page_size:
                bounds.append(positions)
        return min(bounds, default=0) if bounds else 2**62

    def room(self, table: PageTable, computed: int) -> int:
        """How many further positions from `computed` on the free pages can hold."""
        return min(
            (len(table.pages[kind]) + pool.free) * self.page_size - computed for kind, pool in self.pools.items()
        )

    def can_hold(self, length: int) -> bool:
        """Whether the free pages hold a sequence of `length` positions (of a chunked group: its last chunk)."""
        for kind, group in self.groups.items():
            kept = length - group.first_needed(max(length - 1, 0))
            if self.pools[kind].free * self.page_size < kept:
                return False
        return True

    def extend(self, table: PageTable, end: int) -> None:
        """Makes the table cover positions below `end`. The caller has asked `room` first."""
        wanted = -(-end // self.page_size)
        for kind, pool in self.pools.items():
            owned = table.pages[kind]
            if wanted > len(owned):
                owned.extend(pool.take(wanted - len(owned)))

    def release_past(self, table: PageTable, position: int) -> None:
        """Frees the pages that nothing at `position` or later attends to."""
        for kind, group in self.groups.items():
            owned = table.pages[kind]
            past = []
            for index in range(group.first_needed(position) // self.page_size - 1, -1, -1):
                page = owned[index]
                if page is None:
                    break  # everything before it was freed earlier
                past.append(page)
                owned[index] = None
            self.pools[kind].give_back(past)

    def release(self, table: PageTable) -> None:
        """Frees all of a sequence's pages."""
        for kind, owned in table.pages.items():
            self.pools[kind].give_back([page for page in owned if page is not None])
            owned.clear()

    def used(self) -> dict[str, int]:
        return {kind: pool.total - pool.free for kind, pool in self.pools.items()}

    def total(self) -> dict[str, int]:
        return {kind: pool.total for kind, pool in self.pools.items()}
