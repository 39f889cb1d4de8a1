"""Calls are cancelled when their proxy must be dead, and never otherwise."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

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


@pytest.mark.parametrize(
    ("before", "since", "end"),
    [
        pytest.param([], [A, B], "cancelled", id="its only proxy died"),
        pytest.param([], [A | B, B, B], "ended", id="one that could be its proxy lives"),
        pytest.param([], [A | B, NONE, C], "cancelled", id="all that could be its proxy died"),
        pytest.param([A], [NONE, B], "cancelled", id="its proxy died before a look had seen both"),
        pytest.param([], [NONE, A, A], "ended", id="it came before any proxy was seen"),
        pytest.param([A, NONE], [B, NONE, B], "ended", id="it came through the new proxy"),
        pytest.param([A], [B], "ended", id="it came after the proxies were listed"),
    ],
)
def test_what_looks_make_of_a_call(before: Sequence[frozenset[str]], since: Sequence[frozenset[str]], end: str) -> None:
    """Of the proxies at each look: those before the call was there, and since."""

    async def steps(callers: Callers, task: asyncio.Task[str]) -> None:
        for living in before:
            callers.look([], living)
        for living in since:
            callers.look([task], living)

    assert with_call(steps) == end


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
