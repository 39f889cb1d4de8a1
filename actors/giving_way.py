"""Work that gives way to whatever else wants the CPU: an actor that comes up beside others that serve, an encoder.

Also what is on no token's way: the controller, an expert actor's answers to it, and Ray's housekeeping. On a machine
whose cores are all in use, each of its bursts is a pause of every stream.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import psutil

from actors.garbage import keep_all_there_is

Result = TypeVar("Result")
_NICER = 10  # than the process: a ninth of what another thread gets
_RATHER_NICER = 5  # a third
_A_LITTLE_NICER = 3  # half
_NICEST = 19
_HOUSEKEEPERS = ("/dashboard/dashboard.py", "/dashboard/agent.py", "/log_monitor.py", "/_private/monitor.py")
_AGENT_TITLE = "ray::DashboardAgent"  # in place of its command line, once it is up


def giving_way(work: Callable[[], Result]) -> Result:
    """Runs `work` on a thread of its own, since a thread may not raise its priority again; returns its result.

    The threads that OpenMP made for it end with it: as long as there are more than cores, all of them sleep soon, and
    decoding by one actor on two cores takes a fifth longer.
    """
    with ThreadPoolExecutor(1, "load", give_way) as executor:
        return executor.submit(work).result()


def import_giving_way(*modules: str) -> None:
    """Imports these modules, and with them torch: seconds of CPU. For a process that comes up.

    Garbage is not collected meanwhile: there is little, and what is looked through for it grows, a fifth of the time.
    Nor are they looked through when it is over, which would not give way.
    """
    gc.disable()
    try:
        giving_way(lambda: [importlib.import_module(module) for module in modules])
    finally:
        keep_all_there_is()
        gc.enable()


def give_way() -> None:
    """From now on this thread gives way, and what threads it begins, as torch does, with it.

    Not by the policy for idle work, to which a busy machine leaves next to nothing, even while it holds Python's lock.
    """
    _make_nicer([threading.get_native_id()], _NICER)


def tokens_come_first() -> None:
    """From now on this thread, which computes steps, lets those pass that bring the last step's tokens to clients.

    Where cores are all in use, each engine and the gateway use as much of one as is their share. So the gateway would
    have to wait, in the midst of a step's tokens, until an engine has computed a part of its next ones.
    """
    _make_nicer([threading.get_native_id()], _A_LITTLE_NICER)


def threads() -> list[int]:
    """This process's threads by their numbers on Linux, Ray's among them."""
    return [thread.id for thread in psutil.Process().threads()]


def threads_give_way(numbers: Iterable[int]) -> None:
    """From now on these threads of this process give way a little, and with them what they begin: a third of a share.

    They are still to answer in time on a busy machine.
    """
    _make_nicer(numbers, _RATHER_NICER)


def housekeeping_gives_way(ray: psutil.Process) -> None:
    """Ray's dashboard, its agent and its readers of logs give way, if `ray` has begun them, or what that has begun.

    Not its raylet, from which workers would have it for good, nor what starts an actor.
    """
    for child in _children(ray):
        if _keeps_house(child):
            _process_gives_way(child)
        else:
            housekeeping_gives_way(child)


def _keeps_house(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        command = process.cmdline()
        return any(word.endswith(_HOUSEKEEPERS) for word in command[:4]) or command[:1] == [_AGENT_TITLE]
    return False


def _process_gives_way(process: psutil.Process) -> None:
    with suppress(psutil.Error):
        _make_nicer([thread.id for thread in process.threads()], _NICER)
    for child in _children(process):  # begun before, with the niceness of then
        _process_gives_way(child)


def _children(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return process.children()
    return []


def _make_nicer(numbers: Iterable[int], by: int) -> None:
    if sys.platform != "linux":  # where niceness is a thread's own
        return
    for number in numbers:
        with suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, number, min(os.getpriority(os.PRIO_PROCESS, number) + by, _NICEST))
