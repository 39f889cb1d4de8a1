"""Which KV pages are whose. Page ids only: the tensors are llama4.kv_pages.KVPages.

A page holds `page_size` consecutive positions, for all layers of one kind. Full-attention layers need every position of
a sequence; chunked layers only those of the chunk that the next position lies in, so a sequence gives their older pages
back as soon as the chunk is past. Full pages are registered with the prefix cache (engine.prefix_cache), and sequences
with the same beginning share them; nobody writes to a page that is full, so nobody writes to a shared one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from engine.prefix_cache import PagePool

LayerKind: TypeAlias = Literal["full", "chunked"]  # llama4.config's, which would bring torch


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """The layers of one kind: `pages` in their pool; `chunk_size` positions are kept, None for all."""

    pages: int
    chunk_size: int | None = None

    def first_needed(self, position: int) -> int:
        """The first position that a token at `position` attends to."""
        return 0 if self.chunk_size is None else position - position % self.chunk_size

    def most_pages(self, length: int, page_size: int) -> int:
        """How many pages a sequence of `length` positions holds at a time (a chunk may straddle page borders)."""
        pages = -(-length // page_size)
        return pages if self.chunk_size is None else min(pages, -(-self.chunk_size // page_size) + 1)


@dataclass(slots=True)
class PageTable:
    """One sequence's pages in each layer group, by absolute page index; all groups' lists are of one length.

    Entries of chunked groups are None where the page was given back, or was never needed. `kept`: for each group, the
    first index that may not be None.
    """

    pages: dict[LayerKind, list[int | None]]
    kept: dict[LayerKind, int]
    length: int = 0


class PageAllocator:
    """Gives pages to sequences and takes them back, for all layer groups at once."""

    def __init__(self, groups: dict[LayerKind, LayerGroup], page_size: int) -> None:
        self.page_size = page_size
        self.groups = groups
        self.pools = {kind: PagePool(group.pages) for kind, group in groups.items()}

    def new_table(self) -> PageTable:
        return PageTable({kind: [] for kind in self.groups}, dict.fromkeys(self.groups, 0))

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

    # ---- room

    def room(self, table: PageTable, computed: int, wanted: int) -> int:
        """How many of the `wanted` positions from `computed` on the table's and the available pages can hold."""
        if computed + wanted <= table.length * self.page_size:
            return wanted
        rows = wanted
        while True:
            before = rows
            for kind in self.groups:
                rows = min(rows, self._end(kind, table, computed + rows) - computed)
            if rows == before:
                return rows

    def _end(self, kind: LayerKind, table: PageTable, end: int) -> int:
        """How far the available pages of one group reach on the way to `end`."""
        available, first = self.pools[kind].available, table.length
        if available:  # a page at the beginning of the last row's chunk, or behind it: those before are not needed
            first = max(first, self.groups[kind].first_needed(end - 1) // self.page_size)
        return (first + available) * self.page_size

    def owed(self, table: PageTable, length: int) -> dict[str, int]:
        """How many pages a sequence may still ask for on its way to `length` positions."""
        owed: dict[str, int] = {}
        for kind, group in self.groups.items():
            held = table.length
            if group.chunk_size is not None:
                held = sum(page is not None for page in table.pages[kind][table.kept[kind] :])
            owed[kind] = max(0, group.most_pages(length, self.page_size) - held)
        return owed

    # ---- taking and giving back

    def extend(self, table: PageTable, computed: int, end: int) -> None:
        """Makes the table cover the rows from `computed` to `end`. The caller has asked `room` first.

        A chunked group gets pages only from the last row's chunk on: the chunks before it are attended to within this
        step alone, and their rows are never written.
        """
        wanted = -(-end // self.page_size)
        if wanted <= table.length:
            return
        for kind, group in self.groups.items():
            owned = table.pages[kind]
            skipped = max(0, group.first_needed(end - 1) // self.page_size - len(owned))
            owned.extend([None] * skipped)
            owned.extend(self.pools[kind].take(wanted - len(owned)))
        table.length = wanted

    def release_past(self, table: PageTable, position: int) -> None:
        """Gives back the pages that nothing at `position` or later attends to."""
        for kind, group in self.groups.items():
            needed, kept = group.first_needed(position) // self.page_size, table.kept[kind]
            if needed > kept:
                owned = table.pages[kind]
                self.pools[kind].drop(page for page in owned[kept:needed] if page is not None)
                owned[kept:needed] = [None] * (needed - kept)
                table.kept[kind] = needed

    def rewind(self, table: PageTable, position: int) -> None:
        """Gives back the pages that begin at `position` or later: nothing in them counts."""
        kept = -(-position // self.page_size)
        for kind, owned in table.pages.items():
            self.pools[kind].drop(page for page in reversed(owned[kept:]) if page is not None)
            del owned[kept:]
        table.length = kept

    def release(self, table: PageTable) -> None:
        """Gives all of a sequence's pages back. The later ones are evicted first: they need the earlier ones."""
        for kind, owned in table.pages.items():
            self.pools[kind].drop(page for page in reversed(owned[table.kept[kind] :]) if page is not None)
            owned.clear()
            table.kept[kind] = 0
        table.length = 0

    # ---- the prefix cache

    def longest_prefix(self, hashes: Sequence[bytes]) -> int:
        """The length, in pages, of the longest usable prefix of the pages that `hashes` name.

        Full-attention layers need all its pages. Chunked layers need those from the border on of the chunk that the
        next position lies in: none, if the prefix ends at a border.
        """
        best = 0
        runs = dict.fromkeys(self.groups, 0)  # per kind: the first page of the run of known pages that ends here
        for count, key in enumerate(hashes, start=1):
            usable = True
            for kind, group in self.groups.items():
                if self.pools[kind].find(key) is None:
                    if group.chunk_size is None:
                        return best
                    runs[kind] = count
                usable &= runs[kind] <= group.first_needed(count * self.page_size) // self.page_size
            if usable:
                best = count
        return best

    def adopt(self, table: PageTable, hashes: Sequence[bytes]) -> None:
        """Makes an empty table hold the pages of a usable prefix."""
        assert not table.length, "only a sequence without pages takes over a prefix"
        for kind, group in self.groups.items():
            pool, owned = self.pools[kind], table.pages[kind]
            first = group.first_needed(len(hashes) * self.page_size) // self.page_size
            owned.extend([None] * first)
            for key in hashes[first:]:
                page = pool.find(key)
                assert page is not None, "the prefix is usable"
                pool.hold(page)
                owned.append(page)
            table.kept[kind] = first
        table.length = len(hashes)

    def register(self, table: PageTable, hashes: Sequence[bytes], computed: int, end: int) -> None:
        """Tells the cache of the pages that the rows from `computed` to `end`, now written, have completed.

        A chunked group's pages before the last row's chunk are none of them: see `extend`.
        """
        for kind, group in self.groups.items():
            first = max(computed, group.first_needed(end - 1)) // self.page_size
            for index in range(first, end // self.page_size):
                page = table.pages[kind][index]
                assert page is not None, "rows were written to it"
                self.pools[kind].register(page, hashes[index])

    # ---- counts

    def used(self) -> dict[str, int]:
        """Pages that sequences hold."""
        return {kind: pool.total - pool.available for kind, pool in self.pools.items()}

    def cached(self) -> dict[str, int]:
        """Pages that only the prefix cache holds."""
        return {kind: pool.cached for kind, pool in self.pools.items()}

    def total(self) -> dict[str, int]:
        return {kind: pool.total for kind, pool in self.pools.items()}
