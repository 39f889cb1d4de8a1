"""Real processes that a test runs functions in, each as one rank; they outlive groups, worlds and tests."""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "pytest"])


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while (call := pipe.recv()) is not None:
        function, arguments = call
        try:
            pipe.send((True, function(*arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class Pool:
    """Processes by rank; a dead one is replaced when its rank is next asked for."""

    def __init__(self) -> None:
        self._members: dict[int, tuple[Any, Connection]] = {}

    def _member(self, rank: int) -> Connection:
        process, pipe = self._members.get(rank, (None, None))
        if process is None or not process.is_alive():
            pipe, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._members[rank] = process, pipe
        return pipe

    def run(self, ranks: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 40) -> list[Any]:
        """function(rank, *arguments) in processes 0..ranks-1; their results, None for a process that has died."""
        pipes = [self._member(rank) for rank in range(ranks)]
        for rank, pipe in enumerate(pipes):
            pipe.send((function, (rank, *arguments)))
        results = []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(timeout_s):
                self.close()
                raise TimeoutError(f"rank {rank} of {function.__name__} has not ended")
            try:
                ended, result = pipe.recv()
            except EOFError:
                ended, result = True, None
                self._members[rank][0].join()
            if not ended:
                self.close()
                raise AssertionError(f"rank {rank} of {function.__name__}:\n{result}")
            results.append(result)
        return results

    def close(self) -> None:
        for process, _ in self._members.values():
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            process.join()
        self._members.clear()


def start_process(target: Callable[..., None], *arguments: Any) -> tuple[Any, Connection]:
    """A process of its own with a pipe as its first argument."""
    pipe, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    return process, pipe
