"""Which images are encoded, and where in Ray's object store their embeddings are. Imports no torch: gateways use it.

Shapes: P patch tokens of an image, D the text model's width.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from ray import ObjectRef


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """The embeddings [P, D] lie at `ref`, as `embeddings.to_array` makes them. They get lost with a replica."""

    ref: ObjectRef
    nbytes: int


class EncodedImages:
    """The encoded images used last, by digest, as many as fit into `max_bytes`. What it holds stays in the store."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._images: OrderedDict[bytes, EncodedImage] = OrderedDict()  # longest unused first

    def get(self, digest: bytes) -> EncodedImage | None:
        if digest in self._images:
            self._images.move_to_end(digest)
        return self._images.get(digest)

    def put(self, digest: bytes, image: EncodedImage) -> None:
        self.forget(digest)
        self._images[digest] = image
        self._bytes += image.nbytes
        while self._bytes > self._max_bytes:
            _, dropped = self._images.popitem(last=False)
            self._bytes -= dropped.nbytes

    def forget(self, digest: bytes) -> None:
        if (dropped := self._images.pop(digest, None)) is not None:
            self._bytes -= dropped.nbytes
