"""Rows written from where they lie and read to where they belong, however the socket cuts them."""

from __future__ import annotations

import socket
from array import array
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dispatch.pieces import MAX_PIECES, Pieces


def pair(buffer_bytes: int) -> tuple[socket.socket, socket.socket]:
    """Two ends that do not block, and hold little."""
    ends = socket.socketpair()
    for end in ends:
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
    return ends


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    with (found := pair(1))[0], found[1]:
        yield found


def carry(source: Pieces, target: Pieces, here: int, there: int) -> int:
    """Writes and reads by turns until both are through; the number of turns."""
    turns = 0
    while source.left or target.left:
        turns += 1
        for pieces, move, fd in ((source, source.write, here), (target, target.read, there)):
            try:
                while pieces.left:
                    assert move(fd) > 0
            except BlockingIOError:
                continue
    return turns


@given(
    rows=st.lists(st.integers(0, 99), max_size=60),
    width=st.integers(1, 700),
    head=st.binary(min_size=1, max_size=200),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_rows_arrive_where_they_belong(rows: list[int], width: int, head: bytes, dtype: torch.dtype) -> None:
    x_TD = torch.randn(100, width).to(dtype)
    places = torch.randperm(len(rows)).tolist()
    y_ND = torch.full((len(rows) + 1, width), 7).to(dtype)  # the last row is nobody's
    row_bytes = width * dtype.itemsize
    found = array("B", bytes(len(head)))
    here, there = pair(4096)
    with here, there:
        carry(
            Pieces(array("B", head), x_TD, rows, row_bytes),
            Pieces(found, y_ND, places, row_bytes),
            here.fileno(),
            there.fileno(),
        )
    assert found.tobytes() == head
    assert torch.equal(y_ND[places], x_TD[rows])
    assert (y_ND[-1] == 7).all()


def test_more_rows_than_one_call_takes_through_a_small_socket(ends: tuple[socket.socket, socket.socket]) -> None:
    count = 2 * MAX_PIECES + 5
    x_TD, y_TD = torch.randn(count, 3), torch.zeros(count, 3)
    rows = torch.randperm(count).tolist()
    source = Pieces(array("B", b"head"), x_TD, rows, 12)
    assert carry(source, Pieces(array("B", bytes(4)), y_TD, rows, 12), ends[0].fileno(), ends[1].fileno()) > 1
    assert torch.equal(x_TD, y_TD)


def test_the_ends_of_streams(ends: tuple[socket.socket, socket.socket]) -> None:
    here, there = ends
    room = Pieces(array("B", bytes(4)), torch.empty(1, 1), [0], 4)
    with pytest.raises(BlockingIOError):
        room.read(there.fileno())
    here.close()
    assert room.read(there.fileno()) == 0 and room.left == 8
    with pytest.raises(BrokenPipeError):
        room.write(there.fileno())
