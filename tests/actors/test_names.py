"""What Ray's dashboard is given to show of an actor."""

from __future__ import annotations

import asyncio

import pytest

from actors.dashboard import StateShown, held_in_words


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ({}, "no experts"),
        ({0: (), 2: ()}, "no experts"),
        ({3: (5,)}, "experts 5 in 1 layer"),
        ({0: (3, 0, 1, 2), 1: (0, 1, 2, 3)}, "experts 0-3 in 2 layers"),
        ({0: (0, 2, 3, 7), 1: (0, 2, 3, 7), 2: ()}, "experts 0,2-3,7 in 2 layers"),
        ({0: (0, 1), 1: (0, 1, 2)}, "5 experts in 2 layers"),
    ],
)
def test_what_is_held_is_said_in_few_words(held, words):
    assert held_in_words(held) == words


def test_one_call_runs_and_bears_the_present_state():
    async def run() -> None:
        state = "loading"
        calls: dict[str, asyncio.Task[None]] = {}

        def begin(words: str) -> None:
            calls[words] = asyncio.create_task(shown.until_not(words))

        async def until_begun(words: str) -> None:
            while words not in calls:
                await asyncio.sleep(0.001)

        shown = StateShown(lambda: state, begin, every_s=0.001)
        await until_begun("loading")
        await asyncio.sleep(0.01)
        assert not calls["loading"].done()

        state = "serving"
        await until_begun("serving")
        await calls["loading"]
        assert not calls["serving"].done()
        await shown.until_not("loading")  # a call that begins when its state is over does not stay

    asyncio.run(asyncio.wait_for(run(), 10))
