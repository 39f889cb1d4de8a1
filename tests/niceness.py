"""How nice a process' threads are: on Linux, each has a niceness of its own."""

from __future__ import annotations

import os

import psutil


def of_threads(process: psutil.Process) -> set[int]:
    """The niceness of its threads."""
    return {os.getpriority(os.PRIO_PROCESS, thread.id) for thread in process.threads()}
