"""Calls are cancelled when their proxy must be dead, and never otherwise."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from actors.callers import Callers

NONE, A, B, C = frozenset[str](), frozenset({"a"}), frozenset({"b"}), frozenset({"c"})


def with_call(steps: Callable[[Callers, asyncio.Task[str]], Awaitable[None]]) -> str:
    """What a call that nothing else ends comes to; `ended` if nothing cancels it."""

    async def call(callers: Callers, done: asyncio.Event) -> str:
        with callers.call():
            try:
                await done.wait()
            except asyncio.CancelledError:
                return "cancelled"
        return "ended"

    async def run() -> str:
        callers, done = Callers(), asyncio.Event()
        task = asyncio.create_task(call(callers, done))
        await asyncio.sleep(0)
        await steps(callers, task)
        await asyncio.sleep(0)
        done.set()
        result = await task
        assert callers.running() == []
        return result

    return asyncio.run(run())


def test_its_only_proxy_died() -> None:
    async def steps(callers: Callers, task: asyncio.Task[str]) -> None:
        callers.look([task], A)
        callers.look([task], B)

    assert with_call(steps) == "cancelled"


def test_one_that_could_be_its_proxy_lives() -> None:
    async def steps(callers: Callers, task: asyncio.Task[str]) -> None:
        callers.look([task], A | B)
        callers.look([task], B)
        callers.look([task], B)

    assert with_call(steps) == "ended"


def test_all_that_could_be_its_proxy_died() -> None:
    async def steps(callers: Callers, task: asyncio.Task[str]) -> None:
        callers.look([task], A | B)
        callers.look([task], NONE)
        callers.look([task], C)

    assert with_call(steps) == "cancelled"


def test_its_proxy_died_before_a_look_had_seen_both() -> None:
    async def steps(callers: Callers, task: asyncio.Task[str]) -> None:
        callers.look([], A)
        callers.look([task], NONE)
        callers.look([task], B)

    assert with_call(steps) == "cancelled"


def test_it_came_before_any_proxy_was_seen() -> None:
    async def steps(callers: Callers, task: asyncio.Task[str]) -> None:
        callers.look([task], NONE)
        callers.look([task], A)
        callers.look([task], A)

    assert with_call(steps) == "ended"


def test_it_came_through_the_new_proxy() -> None:
    async def steps(callers: Callers, task: asyncio.Task[str]) -> None:
        callers.look([], A)
        callers.look([], NONE)
        callers.look([task], B)
        callers.look([task], NONE)
        callers.look([task], B)

    assert with_call(steps) == "ended"


def test_a_call_that_came_after_the_proxies_were_listed() -> None:
    async def steps(callers: Callers, task: asyncio.Task[str]) -> None:
        callers.look([], A)  # listed before the call was there
        callers.look([task], B)

    assert with_call(steps) == "ended"


def test_an_ended_call_is_let_be() -> None:
    async def run() -> None:
        callers = Callers()

        async def call() -> None:
            with callers.call():
                pass

        task = asyncio.create_task(call())
        await task
        callers.look([task], A)
        callers.look([task], B)
        assert not task.cancelled()

    asyncio.run(run())


def test_the_watch_outlives_errors(monkeypatch) -> None:
    monkeypatch.setattr("actors.callers._LOOK_EVERY_S", 0.001)
    answers = iter([A, None, None, B])

    def living() -> frozenset[str]:
        found = next(answers, B)
        if found is None:
            raise ConnectionError
        return found

    async def steps(callers: Callers, task: asyncio.Task[str]) -> None:
        watching = asyncio.create_task(callers.watch(living))
        await asyncio.wait([task], timeout=10)
        watching.cancel()

    assert with_call(steps) == "cancelled"


def test_no_proxy_in_the_list_is_no_news(monkeypatch) -> None:
    monkeypatch.setattr("actors.callers._LOOK_EVERY_S", 0.001)
    answers = iter([NONE, A, NONE, A])
    looks = 0

    def living() -> frozenset[str]:
        nonlocal looks
        looks += 1
        return next(answers, A)

    async def steps(callers: Callers, task: asyncio.Task[str]) -> None:
        watching = asyncio.create_task(callers.watch(living))
        while looks < 8:
            await asyncio.sleep(0.001)
        watching.cancel()

    assert with_call(steps) == "ended"
