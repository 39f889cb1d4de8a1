"""Work that gives way to whatever else wants the CPU: an actor that comes up beside others that serve, an encoder."""

from __future__ import annotations

import gc
import importlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")
_NICER = 10  # than the process: a ninth of what another thread gets
_NICEST = 19


def giving_way(work: Callable[[], Result]) -> Result:
    """Runs `work` on a thread of its own, since a thread may not raise its priority again; returns its result.

    The threads that OpenMP made for it end with it: as long as there are more than cores, all of them sleep soon, and
    decoding by one actor on two cores takes a fifth longer.
    """
    with ThreadPoolExecutor(1, "load", give_way) as executor:
        return executor.submit(work).result()


def import_giving_way(*modules: str) -> None:
    """Imports these modules, and with them torch: seconds of CPU.

    Garbage is not collected meanwhile: there is little, and what is looked through for it grows, a fifth of the time.
    """
    gc.disable()
    try:
        giving_way(lambda: [importlib.import_module(module) for module in modules])
    finally:
        gc.enable()


def give_way() -> None:
    """From now on this thread gives way, and what threads it begins, as torch does, with it.

    Not by the policy for idle work, to which a busy machine leaves next to nothing, even while it holds Python's lock.
    """
    if sys.platform == "linux":  # where niceness is a thread's own
        niceness = os.getpriority(os.PRIO_PROCESS, 0) + _NICER
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(niceness, _NICEST))
