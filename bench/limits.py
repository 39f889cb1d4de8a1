"""This machine's limits: read bandwidth, fp32 GEMM rate, TCP round trip. Nothing is compiled for it.

Bandwidth is the best of several ways of reading, because none is the fastest everywhere. `memchr` over zeros, called
through ctypes (which lets go of the GIL), does nothing but read: it comes nearest to a hand-written sum.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import socket
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch
import typer

from bench.common import Cell, JsonFile, Report, Result, Threads, apart, seconds

BUFFER_BYTES = 512 << 20  # far more than any last-level cache
GEMM_SIZE = 2048
MESSAGES = (8, 32 << 10)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes read per second and float32 operations per second, with `threads` threads."""

    threads: int
    bandwidth: float
    gemm: float

    @classmethod
    def measure(cls, threads: int) -> Limits:
        return cls(threads, max(bandwidths(threads).values()), gemm_rate(threads))


class MovingLimits:
    """The limits around each piece of work: on a host that others use as well they move by the minute."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._last = self._measure()

    def around(self, work: Callable[[], Result]) -> tuple[Result, Limits]:
        """The result of `work`, and the means of the limits just before and just after it."""
        before, result = self._last, work()
        self._last = after = self._measure()
        bandwidth, gemm = (before.bandwidth + after.bandwidth) / 2, (before.gemm + after.gemm) / 2
        return result, Limits(self._threads, bandwidth, gemm)

    def _measure(self) -> Limits:
        return apart(lambda: Limits.measure(self._threads))


def buffer(nbytes: int, huge_pages: bool) -> torch.Tensor:
    """Zeros, every page of them present; on huge pages if the system gives them."""
    memory = mmap.mmap(-1, nbytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).zero_()


def bandwidths(threads: int, nbytes: int = BUFFER_BYTES, repeats: int = 7) -> dict[str, float]:
    """Bytes per second of each way of reading; the best of `repeats`."""
    before = torch.get_num_threads()
    found = {}
    try:
        for huge_pages in (False, True):
            x = buffer(nbytes, huge_pages)
            suffix = ", huge pages" if huge_pages else ""
            parts = x.chunk(threads)
            torch.set_num_threads(threads)
            found["torch.sum" + suffix] = nbytes / min(seconds(x.sum, repeats))
            torch.set_num_threads(1)
            with ThreadPoolExecutor(threads) as pool:
                for name, read in _READERS.items():
                    taken = seconds(lambda read=read, parts=parts: list(pool.map(read, parts)), repeats)  # type: ignore[misc]
                    found[name + suffix] = nbytes / min(taken)
    finally:
        torch.set_num_threads(before)
    return found


def _memchr(x: torch.Tensor) -> None:
    found = _libc().memchr(ctypes.c_void_p(x.data_ptr()), 1, ctypes.c_size_t(x.nbytes))
    assert not found, "the buffer is all zeros"


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.memchr.restype = ctypes.c_void_p
    return libc


# Each reads a part of the buffer on a thread of its own, without the GIL.
_READERS: dict[str, Callable[[torch.Tensor], object]] = {
    "memchr": _memchr,
    "numpy.max": lambda x: np.max(x.numpy()),
    "torch.dot": lambda x: torch.dot(x, x),
    "torch.sum of parts": torch.sum,
}


def gemm_rate(threads: int, size: int = GEMM_SIZE, repeats: int = 7) -> float:
    """FLOP/s of the best of `repeats` square float32 matrix products."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)
    try:
        return 2 * size**3 / min(seconds(lambda: torch.mm(a, b, out=out), repeats, warmup=2))
    finally:
        torch.set_num_threads(before)


def tcp_round_trip(nbytes: int, rounds: int = 2000) -> float:
    """Median seconds for `nbytes` to another process on this machine and back, over one connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        process = get_context("spawn").Process(target=_echo, args=(port, nbytes, rounds + 10), daemon=True)
        process.start()
        connection, _ = server.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            message = bytes(nbytes)
            found = seconds(lambda: _send_and_receive(connection, message), rounds, warmup=10)
        process.join()
    return statistics.median(found)


def _send_and_receive(connection: socket.socket, message: bytes) -> None:
    connection.sendall(message)
    _receive(connection, len(message))


def _echo(port: int, nbytes: int, rounds: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(rounds):
            connection.sendall(_receive(connection, nbytes))


def _receive(connection: socket.socket, nbytes: int) -> bytearray:
    data = bytearray(nbytes)
    view = memoryview(data)
    while view:
        view = view[connection.recv_into(view) :]
    return data


def main(
    threads: Threads = 2,
    json_file: JsonFile = None,
) -> None:
    """Measure this machine: read bandwidth and fp32 GEMM with 1 and with --threads threads, TCP round trips."""
    report = Report("limits")
    counts = sorted({1, threads})
    by_count = {n: bandwidths(n) for n in counts}
    rows: list[dict[str, Cell]] = [
        {"read": name} | {f"{n} threads GB/s": by_count[n][name] / 1e9 for n in counts} for name in by_count[threads]
    ]
    rows.append({"read": "best"} | {f"{n} threads GB/s": max(by_count[n].values()) / 1e9 for n in counts})
    report.add("read bandwidth", rows, f"{BUFFER_BYTES >> 20} MB, best of several passes")
    gemm: list[dict[str, Cell]] = [{"threads": str(n), "GFLOP/s": gemm_rate(n) / 1e9} for n in counts]
    report.add("fp32 GEMM", gemm, f"{GEMM_SIZE}^3, best of several")
    trips: list[dict[str, Cell]] = [{"bytes": str(n), "round trip us": tcp_round_trip(n) * 1e6} for n in MESSAGES]
    report.add("TCP on the loopback", trips, "two processes, median")
    report.save(json_file)


if __name__ == "__main__":
    typer.run(main)
