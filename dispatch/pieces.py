"""Rows that lie anywhere in memory, written to a socket and read from one where they lie: an address and a length each.

Python's own sendmsg and recvmsg_into want an object for each piece and look at all of them again at each call. A socket
takes some dozens of rows at a time, so that for hundreds of them this is longer than copying takes.
"""

import ctypes
import os
from array import array
from collections.abc import Sequence
from typing import Any

from torch import Tensor

MAX_PIECES = 1024  # of one call, by the system's limit

_LIBC: Any = ctypes.CDLL(None, use_errno=True)
for _call in (_LIBC.readv, _LIBC.writev):
    _call.restype, _call.argtypes = ctypes.c_ssize_t, (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_WORD = "L"  # as long as an address
_IOVEC_BYTES = 2 * array(_WORD).itemsize


class Pieces:
    """A head and rows of one size, in this order: what is left of them to be written, or of their room to be read into.

    Args:
        head: bytes before the rows, at least one.
        memory: contiguous, on the CPU.
        rows: numbers of the rows of `row_bytes` bytes that `memory` is made of.

    Attributes:
        left: bytes that are left.
    """

    __slots__ = ("_address", "_count", "_first", "_iovecs", "_kept", "_row_bytes", "left")

    def __init__(self, head: "array[int]", memory: Tensor, rows: Sequence[int], row_bytes: int) -> None:
        self._kept = head, memory  # as long as anything may be written or read there
        self._row_bytes = row_bytes
        start = memory.data_ptr()
        iovecs = self._iovecs = array(_WORD, (row_bytes,)) * (2 * len(rows) + 2)
        iovecs[2::2] = array(_WORD, [start + row * row_bytes for row in rows])
        iovecs[0], iovecs[1] = head.buffer_info()
        self._address, _ = iovecs.buffer_info()
        self._first = 0  # of those that are left
        self._count = len(rows) + 1
        self.left = iovecs[1] + len(rows) * row_bytes

    def write(self, fd: int) -> int:
        """Write some of what is left; how many bytes. Raises OSError, BlockingIOError if none can be written now."""
        return self._move(_LIBC.writev, fd)

    def read(self, fd: int) -> int:
        """Read into some of the room that is left; how many bytes, 0 at the stream's end. Raises OSError as `write`."""
        return self._move(_LIBC.readv, fd)

    def _move(self, call: Any, fd: int) -> int:
        first = self._first
        moved: int = call(fd, self._address + first * _IOVEC_BYTES, min(self._count - first, MAX_PIECES))
        if moved < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        self.left -= moved
        if self.left:
            self._pass(moved)
        return moved

    def _pass(self, done: int) -> None:
        """So many bytes of what was left are done."""
        iovecs, first = self._iovecs, self._first
        left = iovecs[2 * first + 1]
        if done >= left:  # all that follow are whole rows
            rows, done = divmod(done - left, self._row_bytes)
            first = self._first = first + 1 + rows
        if done:
            iovecs[2 * first] += done
            iovecs[2 * first + 1] -= done
