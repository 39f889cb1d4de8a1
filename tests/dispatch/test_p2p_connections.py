"""Who is let in, who is not, and what a server leaves behind."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from dispatch.connections import HandshakeFailed, Hello, RowFormat, connect
from dispatch.topology import SlotAddress, Topology
from tests.dispatch.members import WIDTH
from tests.dispatch.p2p_world import HOST, SECRET, Attention, Servers, open_fds
from tests.dispatch.pool import Pool
from tests.dispatch.test_p2p_failures import BOTH, ask


@pytest.fixture
def servers() -> Iterator[Servers]:
    made = Servers()
    yield made
    made.close()


@pytest.mark.parametrize("unix", [True, False])
def test_a_wrong_secret_another_life_and_other_rows_are_turned_away(servers: Servers, unix: bool) -> None:
    address = servers.start(0, BOTH, unix=unix)
    hello = Hello(0, RowFormat(WIDTH, torch.float32))
    with pytest.raises((HandshakeFailed, OSError)):
        connect(0, address, hello, b"a guess", timeout_s=2)
    with pytest.raises((HandshakeFailed, OSError)):
        connect(0, replace(address, incarnation="another"), hello, SECRET, timeout_s=2)
    with pytest.raises((HandshakeFailed, OSError)):
        connect(1, address, hello, SECRET, timeout_s=2)
    for other in (Hello(0, RowFormat(WIDTH + 1, torch.float32)), Hello(0, RowFormat(WIDTH, torch.bfloat16))):
        with pytest.raises(HandshakeFailed, match="width or type"):
            connect(0, address, other, SECRET, timeout_s=2)
    connect(0, address, hello, SECRET, timeout_s=2).socket.close()


def test_an_impostor_learns_nothing_and_serves_nobody(servers: Servers) -> None:
    """A server without the secret that repeats what it hears."""
    with socket.create_server((HOST, 0)) as impostor:
        address = SlotAddress("a life", HOST, impostor.getsockname()[1], None)

        def repeat() -> None:
            peer, _ = impostor.accept()
            with peer:
                peer.sendall(b"HRDR\x01\x00\x00\x00" + bytes(32))
                heard = peer.recv(1000)
                peer.sendall(b"\x01" + heard[-32:])

        thread = threading.Thread(target=repeat)
        thread.start()
        with pytest.raises(HandshakeFailed, match="secret"):
            connect(0, address, Hello(0, RowFormat(WIDTH, torch.float32)), SECRET, timeout_s=2)
        thread.join(5)


def test_silent_newcomers_neither_block_nor_stay(servers: Servers) -> None:
    address = servers.start(0, BOTH)
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection((HOST, address.port))) for _ in range(100)]
        rank = Attention(0)
        rank.adopt(Topology(BOTH, {0: address}, SECRET))
        y_TKD, wanted_TKD, _ = ask(rank)
        assert torch.equal(y_TKD, wanted_TKD)
        time.sleep(2.3)
        for newcomer in silent:
            newcomer.settimeout(1)
            while newcomer.recv(100):
                pass
        y_TKD, wanted_TKD, _ = ask(rank)
        assert torch.equal(y_TKD, wanted_TKD)
        rank.close()


def _start_and_stop(_: int) -> tuple[int, int]:
    """Descriptors before a server and after it."""
    before = open_fds()
    servers = Servers()
    address = servers.start(0, BOTH)
    assert address.unix_path is not None
    directory = os.path.dirname(address.unix_path)
    assert os.stat(directory).st_mode & 0o777 == 0o700
    servers.stop(0)
    assert not os.path.exists(directory)
    with pytest.raises(OSError):
        socket.create_connection((HOST, address.port), timeout=1)
    return before, open_fds()


def test_sockets_and_directories_go_with_the_server(alone: Pool) -> None:
    [(before, after)] = alone.run(1, _start_and_stop)
    assert after == before


def test_only_the_given_address_is_bound(servers: Servers) -> None:
    address = servers.start(0, BOTH, unix=False)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", address.port), timeout=1)
