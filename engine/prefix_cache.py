"""Pages with their holders, and what the prefix cache remembers of them. Page ids only, no tensors.

A page is in one of three states: *free*; *held* by one or more sequences; or *cached*: held by none, but with content
that a later sequence may want. Cached pages count as available: they are taken, longest unused first, when no page is
free, so the cache never causes a shortage.

A full page is known by a chained hash over everything that its keys and values depend on: a salt, all tokens before it,
its own, and for tokens of an image, the image. So equal hashes mean equal content, in the layers of every kind.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from engine.request import PromptImage

_DIGEST_BYTES = 16


def extend_hashes(
    hashes: list[bytes], tokens: Sequence[int], page_size: int, salt: str, images: Sequence[PromptImage] = ()
) -> None:
    """Appends the hashes of those full pages of `tokens` that `hashes` does not have yet.

    The same on every machine: BLAKE2b over the parent page's hash and the token ids as little-endian 32-bit integers;
    then for each image that has tokens in the page: the first one's place in the page and in the image, and its digest.
    """
    start, stop = len(hashes) * page_size, len(tokens) // page_size * page_size
    if start == stop:
        return
    parent = hashes[-1] if hashes else hashlib.blake2b(salt.encode(), digest_size=_DIGEST_BYTES).digest()
    layout = struct.Struct(f"<{page_size}I")
    for first in range(start, stop, page_size):
        packed = layout.pack(*tokens[first : first + page_size])
        content = b"".join(_image_parts(images, first, first + page_size))
        parent = hashlib.blake2b(parent + packed + content, digest_size=_DIGEST_BYTES).digest()
        hashes.append(parent)


def _image_parts(images: Sequence[PromptImage], first: int, stop: int) -> Iterator[bytes]:
    for image in images:
        if image.start < stop and image.stop > first:
            begin = max(image.start, first)
            yield struct.pack("<II", begin - first, begin - image.start) + image.digest


class PagePool:
    """Reference counts, free pages (last freed first used: its memory is the warmest) and cached pages."""

    def __init__(self, pages: int) -> None:
        self.total = pages
        self._free = list(range(pages - 1, -1, -1))
        self._holders = [0] * pages
        self._key_of: list[bytes | None] = [None] * pages
        self._page_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # longest unused first

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._cached)

    @property
    def cached(self) -> int:
        """Pages that only the cache holds."""
        return len(self._cached)

    def holders(self, page: int) -> int:
        """How many sequences hold the page."""
        return self._holders[page]

    def take(self, count: int) -> list[int]:
        """Pages for one new holder to write to. The caller has made sure that they are available."""
        assert count <= self.available, "the scheduler checks for room first"
        cut = max(0, len(self._free) - count)
        taken = self._free[cut:][::-1]
        del self._free[cut:]
        while len(taken) < count:
            page, _ = self._cached.popitem(last=False)
            key = self._key_of[page]
            assert key is not None
            del self._page_of[key]
            self._key_of[page] = None
            taken.append(page)
        for page in taken:
            self._holders[page] = 1
        return taken

    def hold(self, page: int) -> None:
        """Adds a holder, who reads the page but does not write to it."""
        if not self._holders[page]:
            del self._cached[page]
        self._holders[page] += 1

    def drop(self, pages: Iterable[int]) -> None:
        """Takes one holder from each; of those that become cached, the first ones are the first to be taken again."""
        for page in pages:
            assert self._holders[page] > 0, "a page was dropped twice"
            self._holders[page] -= 1
            if not self._holders[page]:
                if self._key_of[page] is None:
                    self._free.append(page)
                else:
                    self._cached[page] = None

    def register(self, page: int, key: bytes) -> None:
        """The page's content is complete and is what `key` names. A key's first page stays the one that is found."""
        assert self._holders[page] > 0, "only a held page has content of its own"
        if self._key_of[page] is None and key not in self._page_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def find(self, key: bytes) -> int | None:
        """The page, held or cached, whose content is what `key` names."""
        return self._page_of.get(key)
