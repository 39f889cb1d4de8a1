"""Tiles of several images through the encoder together.

Shapes: N tiles of a batch or of an image, C colours, H and W a tile's sides, M tokens of a tile, D the text model's
width.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Tiles = NDArray[np.float32]


@dataclass(eq=False, slots=True)
class _Image:
    """An image on its way: `taken` of its tiles are or were in a batch; `encoded_NMD` is what came out."""

    tiles_NCHW: Tiles
    result: asyncio.Future[Tensor]
    taken: int = 0
    encoded_NMD: list[Tensor] = field(default_factory=list)


class TileBatcher:
    """First come, first served; while a batch is in the encoder, the next one gathers. Not for several event loops.

    Args:
        encode: tiles_NCHW to embeddings_NMD; called on `executor`, one batch at a time.
        max_tiles: of a batch. An image that has more goes through in several.
    """

    def __init__(self, encode: Callable[[Tiles], Tensor], max_tiles: int, executor: Executor) -> None:
        self._encode = encode
        self._max_tiles = max_tiles
        self._executor = executor
        self._waiting: deque[_Image] = deque()
        self._runner: asyncio.Task[None] | None = None

    @property
    def waiting_tiles(self) -> int:
        """Tiles that no batch has taken yet."""
        return sum(len(image.tiles_NCHW) - image.taken for image in self._waiting)

    async def encode(self, tiles_NCHW: Tiles) -> Tensor:
        """An image's embeddings_NMD. Raises what its batch's encoding raised."""
        image = _Image(tiles_NCHW, asyncio.get_running_loop().create_future())
        self._waiting.append(image)
        if self._runner is None:
            self._runner = asyncio.create_task(self._run())
        return await image.result

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._take():
            tiles_NCHW = np.concatenate([tiles for _, tiles in batch])
            try:
                encoded_NMD = await loop.run_in_executor(self._executor, self._encode, tiles_NCHW)
            except Exception as error:  # whatever it is, it is these images' and the next batch may do well
                self._fail([image for image, _ in batch], error)
            else:
                parts_NMD = encoded_NMD.split([len(tiles) for _, tiles in batch])
                for (image, _), part_NMD in zip(batch, parts_NMD, strict=True):
                    self._give(image, part_NMD)
        self._runner = None

    def _take(self) -> list[tuple[_Image, Tiles]]:
        """The next batch: images, and those of their tiles that are in it."""
        batch: list[tuple[_Image, Tiles]] = []
        room = self._max_tiles
        while self._waiting and room:
            image = self._waiting[0]
            if image.result.done():  # whoever asked has gone
                self._waiting.popleft()
                continue
            tiles_NCHW = image.tiles_NCHW[image.taken : image.taken + room]
            batch.append((image, tiles_NCHW))
            image.taken += len(tiles_NCHW)
            room -= len(tiles_NCHW)
            if image.taken == len(image.tiles_NCHW):
                self._waiting.popleft()
        return batch

    def _give(self, image: _Image, part_NMD: Tensor) -> None:
        image.encoded_NMD.append(part_NMD)
        if image.taken == len(image.tiles_NCHW) and not image.result.done():
            image.result.set_result(torch.cat(image.encoded_NMD))

    def _fail(self, images: list[_Image], error: Exception) -> None:
        for image in images:
            if image in self._waiting:
                self._waiting.remove(image)
            if not image.result.done():
                image.result.set_exception(error)
