"""Images wait as long as they slow down streams, and no longer. Time is simulated: a step is what a token takes."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable
from contextlib import nullcontext

import pytest

from actors.image_pace import ImagePace

USUAL_S = 0.01  # per token


class World:
    """One stream, and images that each take `cost_s` of it: a token takes longer the more of them have begun lately."""

    def __init__(self, slowdown: float | None, cost_s: float, begins_s: float = 0.0, ends_s: float = 1.0) -> None:
        self.now = 0.0
        self.cost_s = cost_s
        self._begins_s, self._ends_s = begins_s, ends_s
        self.pace = ImagePace(slowdown, lambda: self.now, self._sleep)
        self.begun: list[float] = []
        self.waited: list[float] = []
        self.pace.on_turn = self.waited.append
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._count = itertools.count()

    async def _sleep(self, seconds: float) -> None:
        woken = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.now + seconds, next(self._count), woken))
        await woken

    async def image(self) -> None:
        await self.pace.turn()
        self.begun.append(self.now)

    def _token_s(self) -> float:
        """Each image's work is spread over some time behind its turn."""
        lately = sum(self._begins_s <= self.now - at < self._ends_s for at in self.begun)
        return USUAL_S * (1 + lately * self.cost_s / (self._ends_s - self._begins_s))

    async def run(self, until: Callable[[], bool], take: Callable[[int], None] | None) -> list[float]:
        """Tokens come, or time passes, until that is so; what each took."""
        taken = []
        while not until():
            assert self.now < 1000, "images wait for ever"
            taken.append(self._token_s())
            self.now += taken[-1]
            if take is not None:
                take(1)
            while self._sleepers and self._sleepers[0][0] <= self.now:
                woken = heapq.heappop(self._sleepers)[2]
                if not woken.done():
                    woken.set_result(None)
            for _ in range(5):  # who was woken goes on, and whoever waits behind it
                await asyncio.sleep(0)
        return taken


async def burst(world: World, images: int, streams: bool = True) -> tuple[float, float]:
    """How much slower the stream is while so many images come at once; seconds until the last one has begun."""
    with world.pace.stream() if streams else nullcontext() as stream:
        start, before = world.now + 5.0, len(world.begun)
        take = None if stream is None else stream.take
        await world.run(lambda: world.now >= start, take)
        tasks = [asyncio.create_task(world.image()) for _ in range(images)]
        taken = await world.run(lambda: len(world.begun) == before + images, take)
        await asyncio.gather(*tasks)
        return sum(taken) / len(taken) / USUAL_S - 1, world.now - start


@pytest.mark.parametrize("cost_s", [0.02, 0.05, 0.1])
def test_a_burst_slows_streams_by_little_more_than_allowed(cost_s: float) -> None:
    slower, seconds = asyncio.run(burst(World(0.2, cost_s), 100))
    assert slower < 0.3  # all at once it were 2 to 10
    assert seconds < 1.5 * max(100 * cost_s / 0.2, 10)  # and what may be taken is taken


@pytest.mark.parametrize("cost_s", [0.02, 0.05])
def test_streams_get_back_what_images_that_began_too_soon_took(cost_s: float) -> None:
    async def two() -> list[tuple[float, float]]:
        world = World(0.1, cost_s, begins_s=1.0, ends_s=3.0)
        return [await burst(world, 50), await burst(world, 50)]

    for slower, _ in asyncio.run(two()):
        assert slower < 0.11  # up to 0.22 if images only became fewer


def test_images_that_cost_nothing_wait_for_little() -> None:
    slower, seconds = asyncio.run(burst(World(0.2, 0.0), 200))
    assert slower == pytest.approx(0)
    assert seconds < 6


def test_waits_are_told() -> None:
    world = World(0.2, 0.05)
    seconds = asyncio.run(burst(world, 20))[1]
    assert len(world.waited) == 20
    assert world.waited == sorted(world.waited)  # all came at once, and have their turns in order
    assert world.waited[-1] == pytest.approx(seconds, abs=2 * USUAL_S)


def test_without_streams_nothing_waits() -> None:
    assert asyncio.run(burst(World(0.2, 0.2), 200, streams=False))[1] <= 2 * USUAL_S


def test_turned_off() -> None:
    assert asyncio.run(burst(World(None, 0.2), 200))[1] <= 1.5 * 200 * 0.2


def test_what_a_slow_burst_has_taught_is_unlearnt() -> None:
    world = World(0.2, 0.5)

    async def two() -> float:
        await burst(world, 30)
        world.cost_s = 0.0
        return (await burst(world, 100))[1]

    assert asyncio.run(two()) < 15


def test_who_leaves_the_queue_takes_no_turn() -> None:
    world = World(0.2, 0.0)

    async def go() -> None:
        with world.pace.stream() as stream:
            stream.take(1)
            tasks = [asyncio.create_task(world.image()) for _ in range(10)]
            await world.run(lambda: len(world.begun) >= 2, stream.take)
            for task in tasks[2:9]:
                task.cancel()
            before = world.now
            await world.run(lambda: tasks[9].done(), stream.take)
            assert world.now - before < 1.0
            assert len(world.begun) == 3

    asyncio.run(go())
