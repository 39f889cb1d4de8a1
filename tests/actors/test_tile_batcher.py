"""Tiles of several images in one batch: everybody gets their own back, and batches are as full as they can be."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from actors.tile_batcher import TileBatcher, Tiles


@pytest.fixture(scope="module")
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


class Encoder:
    """A tile's embeddings are twice its number; `batches` are the numbers of tiles. Tile -1 breaks its batch."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.open = threading.Event()
        self.open.set()

    def __call__(self, tiles_NCHW: Tiles) -> Tensor:
        self.open.wait()
        self.batches.append(len(tiles_NCHW))
        if (tiles_NCHW == -1).any():
            raise ArithmeticError("broken")
        return 2 * torch.from_numpy(tiles_NCHW).reshape(len(tiles_NCHW), 1, 1).repeat(1, 3, 4)


def image(first: int, tiles: int) -> Tiles:
    return np.arange(first, first + tiles, dtype=np.float32).reshape(-1, 1, 1, 1)


async def until_waiting(batcher: TileBatcher, tiles: int) -> None:
    while batcher.waiting_tiles != tiles:
        await asyncio.sleep(0.001)


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=12), most=st.integers(1, 8))
def test_batches_are_full_and_everybody_gets_their_own(executor, counts, most):
    async def run() -> None:
        encoder = Encoder()
        batcher = TileBatcher(encoder, most, executor)
        images = [image(100 * n, count) for n, count in enumerate(counts)]
        found = await asyncio.gather(*(batcher.encode(tiles) for tiles in images))
        for tiles, embeddings in zip(images, found, strict=True):
            assert embeddings.shape == (len(tiles), 3, 4)
            assert embeddings[:, 1, 2].tolist() == (2 * tiles.flatten()).tolist()
        # All were there before the first batch: only the last one may have room.
        full, rest = divmod(sum(counts), most)
        assert encoder.batches == [most] * full + [rest] * (rest > 0)
        assert batcher.waiting_tiles == 0

    asyncio.run(run())


async def test_the_next_batch_gathers_while_one_is_encoded(executor):
    encoder = Encoder()
    encoder.open.clear()
    batcher = TileBatcher(encoder, 4, executor)
    tasks = [asyncio.create_task(batcher.encode(image(0, 1)))]
    await until_waiting(batcher, 0)
    await asyncio.sleep(0)
    for n in (1, 2, 3):
        tasks.append(asyncio.create_task(batcher.encode(image(10 * n, 1))))
    await until_waiting(batcher, 3)
    encoder.open.set()
    await asyncio.gather(*tasks)
    assert encoder.batches == [1, 3]
    await batcher.encode(image(0, 2))  # and again, after it had nothing to do
    assert encoder.batches == [1, 3, 2]


async def test_a_batch_that_breaks_takes_only_its_images_with_it(executor):
    encoder = Encoder()
    batcher = TileBatcher(encoder, 3, executor)
    broken = image(-1, 7)  # three batches; the first one breaks, and the others are not tried
    before, _, after = await asyncio.gather(
        batcher.encode(image(5, 1)), batcher.encode(broken), batcher.encode(image(6, 1)), return_exceptions=True
    )
    assert isinstance(before, ArithmeticError)
    assert after[0, 0, 0] == 12
    assert encoder.batches == [3, 1]


async def test_who_goes_away_before_its_turn_is_passed_over(executor):
    encoder = Encoder()
    encoder.open.clear()
    batcher = TileBatcher(encoder, 2, executor)
    first = asyncio.create_task(batcher.encode(image(0, 1)))
    await asyncio.sleep(0.01)
    gone, last = (asyncio.create_task(batcher.encode(image(n, 1))) for n in (1, 2))
    await until_waiting(batcher, 2)
    gone.cancel()
    encoder.open.set()
    assert (await last)[0, 0, 0] == 4 and (await first)[0, 0, 0] == 0
    assert encoder.batches == [1, 1]
