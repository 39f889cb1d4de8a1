"""Lanes, over gloo: how they form, whom they believe, and how they end. What travels by them is in test_p2p*.py."""

import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatch.connections import HandshakeFailed, Hello, RowFormat, connect
from dispatch.lanes import CLIENT, SERVER, Lane, LaneBroken
from dispatch.pair_store import PairStore
from dispatch.topology import Topology
from tests.dispatch import p2p_world
from tests.dispatch.members import LAYERS, WIDTH, make_map
from tests.dispatch.p2p_world import HOST, SECRET, Attention, Servers, open_fds, settled
from tests.dispatch.pool import Pool
from tests.dispatch.test_p2p import batch, expected

CPU = torch.device("cpu")


def form(timeout_s: float = 20.0) -> tuple[Lane, Lane]:
    """Both ends of one lane: the client's, the server's."""
    ends = socket.socketpair()
    with ends[0], ends[1], ThreadPoolExecutor(2) as pool:
        client, server = pool.map(lambda rank: Lane.form(ends[rank], rank, CPU, HOST, timeout_s), (CLIENT, SERVER))
    return client, server


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.001)


@pytest.fixture
def lanes_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[Servers]:
    monkeypatch.setattr(p2p_world, "lanes_on", CPU)
    servers = Servers()
    yield servers
    servers.close()


def test_both_directions_go_at_once_and_in_order() -> None:
    client, server = form()
    tensors = [torch.randn(n, 5) for n in (1, 4, 300_000, 2)]
    for ours, theirs in ((client, server), (server, client)):
        for tensor in tensors:
            ours.send(tensor)
        for tensor in tensors:
            room = torch.empty_like(tensor)
            assert not theirs.received()
            theirs.receive(room)
            until(theirs.received)
            assert torch.equal(room, tensor)
    client.close()
    server.close()


def test_the_end_of_one_end_ends_the_others_waiting() -> None:
    client, server = form()
    server.receive(torch.empty(3, 3))
    client.close()
    client.close()
    with pytest.raises(LaneBroken, match="closed"):
        client.send(torch.zeros(3, 3))
    with pytest.raises(LaneBroken):
        until(server.received)
    with pytest.raises(LaneBroken):
        server.received()
    server.close()


def _form_and_close(_: int) -> tuple[int, int]:
    """Descriptors after one lane, and after thirty more."""

    def turn() -> None:
        for end in form():
            end.close()

    turn()
    before, _ = settled()
    for _ in range(30):
        turn()
    until(lambda: not any(thread.name.startswith("lane-") for thread in threading.enumerate()))
    return before, open_fds()


def test_nothing_is_left_of_lanes_that_were(alone: Pool) -> None:
    [(before, after)] = alone.run(1, _form_and_close)
    assert abs(after - before) <= 2


def test_an_end_that_never_comes_is_given_up() -> None:
    ours, theirs = socket.socketpair()
    start = time.monotonic()
    with pytest.raises(LaneBroken, match="no way for rows"):
        Lane.form(ours, CLIENT, CPU, HOST, timeout_s=0.3)
    assert time.monotonic() - start < 5
    theirs.close()
    with pytest.raises(LaneBroken, match="no way for rows"):
        Lane.form(ours, CLIENT, CPU, HOST, timeout_s=20)
    ours.close()


def test_a_store_of_two() -> None:
    ours, theirs = socket.socketpair()
    one, other = PairStore(ours, 20), PairStore(theirs, 20)
    one.set("a", b"\x00\xff")
    other.set("b", "text")
    assert not other.check(["a"])
    other.wait(["a"])
    assert one.get("b") == b"text" and other.get("a") == b"\x00\xff" and other.check(["a", "b"])
    one.set("late", b"1")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(PairStore.settle, (one, other)))
    assert other.get("late") == b"1"
    with pytest.raises(OSError, match="never set"):
        other.get("more")
    ours.sendall(b"free")
    assert theirs.recv(100) == b"free"
    ours.close()
    theirs.close()


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=200)
    | st.builds(lambda key, value: struct.pack("<HI", len(key), len(value)) + key + value, st.binary(), st.binary())
)
def test_a_store_takes_no_harm_from_any_bytes(junk: bytes) -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(junk)
    theirs.close()
    with ours, pytest.raises(OSError):
        PairStore(ours, 20).get("what is not there")


def test_an_end_that_proves_itself_and_sends_nonsense_is_parted_from(
    lanes_everywhere: Servers, caplog: pytest.LogCaptureFixture
) -> None:
    expert_map = make_map(1, (0,), 1)
    address = lanes_everywhere.start(0, expert_map)
    for junk in (b"", b"\xff" * 100, random.Random(1).randbytes(5000), b"\2\0\1\0\0\0\xff\xff1", bytes(6)):
        liar = connect(0, address, Hello(7, RowFormat(WIDTH, torch.float32, CPU)), SECRET, timeout_s=5).socket
        liar.settimeout(20)
        with liar, suppress(ConnectionResetError):
            liar.sendall(junk)
            liar.shutdown(socket.SHUT_WR)
            while liar.recv(4096):
                pass
    assert caplog.text.count("parts from attention 7") == 5
    rank = Attention(0)
    rank.adopt(Topology(expert_map, {0: address}, SECRET))
    x_TD, ids_TK = batch(9, 2, 0)
    assert torch.equal(
        rank.dispatcher.combine(rank.dispatcher.dispatch(x_TD, ids_TK, LAYERS[0])), expected(x_TD, ids_TK, LAYERS[0])
    )
    rank.close()


def test_both_ends_have_to_want_lanes(lanes_everywhere: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    expert_map = make_map(1, (0, 2), 1)
    by_lanes = lanes_everywhere.start(0, expert_map)
    monkeypatch.setattr(p2p_world, "lanes_on", None)
    by_socket = lanes_everywhere.start(2, expert_map)
    for slot, address, lanes_on in ((0, by_lanes, None), (2, by_socket, CPU)):
        with pytest.raises(HandshakeFailed, match="by another way"):
            connect(slot, address, Hello(0, RowFormat(WIDTH, torch.float32, lanes_on)), SECRET, timeout_s=5)
