"""What Ray's dashboard shows of an actor's state.

The dashboard takes an actor's repr once, when the actor has come to be, and has no field for what changes afterwards.
But it lists an actor's calls by name while they run. So each actor keeps a call to itself open whose name is its state:
the one that runs is the present state, those that have finished are its history.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence

import ray

_LOOK_EVERY_S = 1.0


class StateShown:
    """Keeps an actor's method `in_state` running under its state's name. Made in the actor's event loop.

    `state` says it in words; `begin` calls `in_state` with these words, under this name, and does not wait.
    """

    def __init__(self, state: Callable[[], str], begin: Callable[[str], None], every_s: float = _LOOK_EVERY_S) -> None:
        self._state = state
        self._begin = begin
        self._every_s = every_s
        self._words = ""
        self._changed = asyncio.Condition()
        self._task = asyncio.get_event_loop().create_task(self._follow())

    async def _follow(self) -> None:
        while True:
            words = self._state()
            if words != self._words:
                async with self._changed:
                    self._words = words
                    self._changed.notify_all()
                self._begin(words)
            await asyncio.sleep(self._every_s)

    async def until_not(self, words: str) -> None:
        """Returns as soon as the state is another one."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._words != words)


def call_in_state(words: str) -> None:
    """Calls this actor's own `in_state`, under the name that the dashboard is to show."""
    ray.get_runtime_context().current_actor.in_state.options(name=words).remote(words)


def held_in_words(held: Mapping[int, Sequence[int]]) -> str:
    """`held`: layer → experts. "experts 0-7 in 4 layers"; "31 experts in 4 layers" if layers differ."""
    layers = {layer: tuple(sorted(experts)) for layer, experts in held.items() if experts}
    if not layers:
        return "no experts"
    over = f"in {len(layers)} layer{'s' if len(layers) > 1 else ''}"
    if len(set(layers.values())) > 1:
        return f"{sum(len(experts) for experts in layers.values())} experts {over}"
    return f"experts {_ranges(next(iter(layers.values())))} {over}"


def _ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers, runs of them by their ends: 0-3,7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
