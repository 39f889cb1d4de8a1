"""Calls whose caller has died. Serve cancels a call whose client goes away, and so does a gRPC server of our own; but
when Serve's gRPC proxy dies, its calls would run on to their ends for nobody. (Over HTTP, Serve's `receive` fails.)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

log = logging.getLogger("herder")

_LOOK_EVERY_S = 0.5  # shorter than Serve needs to replace a proxy
_SERVE = "serve"  # Ray's namespace of Serve's own actors
_PROXY = "SERVE_PROXY_ACTOR"


class Callers:
    """Cancels the calls of proxies that are gone.

    A call does not tell by which proxy it came. It is cancelled when others live, but none of those that lived at the
    looks before and after it came: at once where there is one proxy, and never wrongly where there are several.
    """

    def __init__(self) -> None:
        self._calls: dict[asyncio.Task[Any], frozenset[str] | None] = {}
        self._lived: frozenset[str] = frozenset()  # the last proxies that were seen

    @contextmanager
    def call(self) -> Iterator[None]:
        """The current task serves a call."""
        task = asyncio.current_task()
        assert task is not None
        self._calls[task] = None
        try:
            yield
        finally:
            del self._calls[task]

    def running(self) -> list[asyncio.Task[Any]]:
        return list(self._calls)

    def look(self, calls: Sequence[asyncio.Task[Any]], living: frozenset[str]) -> None:
        """Cancels those of the calls that nobody waits for. The proxies were listed when the calls were there.

        That none lives is no reason yet: Serve replaces the proxy, or Ray's head is just coming back and knows of none.
        """
        for task in calls:
            if task not in self._calls:  # it has ended
                continue
            could_be = self._calls[task]
            if could_be is None:  # seen for the first time: its proxy may have died since it came
                self._calls[task] = self._lived | living or None
            elif living and not could_be & living:
                log.info("call cancelled: its proxy has died")
                task.cancel()
        self._lived = living or self._lived

    async def watch(self, living: Callable[[], frozenset[str]]) -> None:
        """Looks again and again, until cancelled. `living` may block; while it raises, nothing is known."""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            if calls := self.running():
                try:
                    self.look(calls, await asyncio.to_thread(living))
                except Exception as error:
                    log.warning("Serve's proxies are not known: %s", error)


def living_proxies() -> frozenset[str]:
    """The actor ids of Serve's proxies."""
    names = [entry["name"] for entry in ray.util.list_named_actors(all_namespaces=True) if entry["namespace"] == _SERVE]
    return frozenset(actor_id for name in names if name.startswith(_PROXY) if (actor_id := _actor_id(name)))


def _actor_id(name: str) -> str | None:
    try:
        return str(ray.get_actor(name, namespace=_SERVE)._ray_actor_id.hex())
    except ValueError:  # it died meanwhile
        return None
