"""Messages survive the trip; whatever else comes out of a socket neither crashes nor hangs either side."""

import socket
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatch.connections import Connection, Hello, RowFormat, connect
from dispatch.expert_map import ExpertMap
from dispatch.server_peer import rest_of
from dispatch.topology import SlotAddress, Topology
from dispatch.wire import (
    HEADER_BYTES,
    MAX_ENTRIES,
    MAX_ROWS,
    Kind,
    MalformedMessage,
    Refusal,
    decode_entries,
    decode_header,
    encode_answer,
    encode_rows,
    refusal_text,
)
from tests.dispatch.members import NUM_EXPERTS, WIDTH
from tests.dispatch.p2p_world import HOST, SECRET, Attention, Servers
from tests.dispatch.test_p2p import batch, expected

LAYER = 1
MAP = ExpertMap(1, {LAYER: tuple((0,) for _ in range(NUM_EXPERTS))})
ROW_BYTES = WIDTH * 4


def rows_message(entries: list[tuple[int, int]], rows: int | None = None, row_bytes: int = ROW_BYTES) -> bytes:
    count = sum(count for _, count in entries) if rows is None else rows
    return encode_rows([number for entry in entries for number in entry], 1, 1, 2, 3, LAYER, 0, 0, count, row_bytes)


def read(message: bytes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    view = memoryview(message)
    header = decode_header(view, dtype=1, row_bytes=ROW_BYTES, max_entries=NUM_EXPERTS)
    if len(message) < header.payload_at:
        raise MalformedMessage("not all has come")
    return decode_entries(view, header)


ENTRIES = st.dictionaries(st.integers(0, 2**32 - 1), st.integers(1, 50), min_size=1, max_size=NUM_EXPERTS)


@given(ENTRIES)
def test_a_message_says_what_was_said(entries: dict[int, int]) -> None:
    message = rows_message(list(entries.items()))
    assert read(message) == (tuple(entries), tuple(entries.values()))
    header = decode_header(memoryview(message), dtype=1, row_bytes=ROW_BYTES, max_entries=NUM_EXPERTS)
    assert (header.kind, header.epoch, header.step, header.serial, header.layer) == (Kind.ROWS, 1, 2, 3, LAYER)
    assert header.payload_at == len(message) and header.length == len(message) + sum(entries.values()) * ROW_BYTES


@given(ENTRIES, st.data())
def test_a_flipped_bit_is_noticed(entries: dict[int, int], data: st.DataObject) -> None:
    message = bytearray(rows_message(list(entries.items())))
    bit = data.draw(st.integers(0, 8 * len(message) - 1))
    message[bit // 8] ^= 1 << bit % 8
    with pytest.raises(MalformedMessage):
        read(bytes(message))


@pytest.mark.parametrize(
    "message",
    [
        rows_message([(0, 1)], rows=0),
        rows_message([(0, MAX_ROWS + 1)]),
        rows_message([(0, 1)], rows=2),
        rows_message([(0, 1), (0, 1)]),
        rows_message([(expert, 1) for expert in range(NUM_EXPERTS + 1)]),
        rows_message([(0, 1)], row_bytes=ROW_BYTES * 2),
        bytes(200),
    ],
)
def test_what_cannot_be_is_refused(message: bytes) -> None:
    with pytest.raises(MalformedMessage):
        read(message)


def test_an_answer_repeats_what_it_answers() -> None:
    asked = decode_header(memoryview(rows_message([(3, 2)])), dtype=1, row_bytes=ROW_BYTES, max_entries=8)
    for refusal, kind in ((Refusal.NONE, Kind.RESULTS), (Refusal.NOT_HELD, Kind.REFUSED)):
        message = memoryview(encode_answer(asked, refusal))
        answer = decode_header(message, dtype=1, row_bytes=ROW_BYTES, max_entries=0)
        decode_entries(message, answer)
        assert (answer.kind, answer.refusal, answer.serial, answer.rows) == (kind, refusal, 3, 2)
        assert len(message) == HEADER_BYTES
    assert len(refusal_text("why", asked)) == len(refusal_text("x" * 1000, asked)) == 2 * ROW_BYTES


@given(st.lists(st.binary(max_size=5), max_size=6), st.integers(0, 30))
def test_the_rest_of_pieces(pieces: list[bytes], done: int) -> None:
    whole = b"".join(pieces)
    done = min(done, len(whole))
    assert b"".join(rest_of([memoryview(piece) for piece in pieces], done)) == whole[done:]


# ---- foreign bytes on the server's sockets


@pytest.fixture(scope="module")
def address() -> Iterator[SlotAddress]:
    servers = Servers()
    yield servers.start(0, MAP)
    servers.close()


def still_serves(address: SlotAddress) -> None:
    rank = Attention(7)
    rank.adopt(Topology(MAP, {0: address}, SECRET))
    x_TD, ids_TK = batch(4, 2, 0)
    assert torch.equal(
        rank.dispatcher.combine(rank.dispatcher.dispatch(x_TD, ids_TK, LAYER)), expected(x_TD, ids_TK, 1)
    )
    assert not rank.losses
    rank.close()


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=400))
def test_foreign_bytes_instead_of_a_handshake(address: SlotAddress, foreign: bytes) -> None:
    with socket.create_connection((HOST, address.port), timeout=5) as stranger:
        stranger.recv(40)
        stranger.sendall(foreign)
        if len(foreign) >= 73:  # else the server waits for the rest, for two seconds
            with pytest.raises((ConnectionError, AssertionError)):
                assert stranger.recv(100)
    still_serves(address)


def known(address: SlotAddress) -> Connection:
    connection = connect(0, address, Hello(0, RowFormat(WIDTH, torch.float32)), SECRET, timeout_s=5)
    connection.socket.settimeout(5)
    return connection


@settings(max_examples=60, deadline=None)
@given(ENTRIES, st.data())
def test_a_peer_that_sends_nonsense_is_cut_off(
    address: SlotAddress, entries: dict[int, int], data: st.DataObject
) -> None:
    head = bytearray(rows_message(list(entries.items())))
    place = data.draw(st.integers(0, len(head) - 1))
    head[place] ^= data.draw(st.integers(1, 255))
    peer = known(address).socket
    with peer:
        peer.sendall(head + bytes(sum(entries.values()) * ROW_BYTES))
        peer.shutdown(socket.SHUT_WR)  # a length may have been made longer
        with pytest.raises((ConnectionError, AssertionError)):
            assert peer.recv(100)
    still_serves(address)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_truncated_message_ends_with_its_sender(address: SlotAddress, data: st.DataObject) -> None:
    message = rows_message([(0, 2), (5, 1)]) + bytes(3 * ROW_BYTES)
    cut = data.draw(st.integers(0, len(message) - 1))
    peer = known(address).socket
    peer.sendall(message[:cut])
    peer.close()
    still_serves(address)


def test_an_oversized_message_is_not_waited_for(address: SlotAddress) -> None:
    for entries in ([(0, MAX_ROWS + 1)], [(expert, 1) for expert in range(MAX_ENTRIES + 1)]):
        with known(address).socket as peer:
            peer.sendall(rows_message(entries))
            with pytest.raises((ConnectionError, AssertionError)):
                assert peer.recv(100)
    still_serves(address)


# ---- foreign bytes on the dispatcher's socket


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_an_answer_that_is_nonsense_loses_the_slot(data: st.DataObject) -> None:
    """Corrupt, truncated or foreign: the rows are lost, the dispatcher goes on."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    asked = decode_header(memoryview(rows_message([(3, 2)])), dtype=1, row_bytes=ROW_BYTES, max_entries=8)
    answer = bytearray(encode_answer(asked._replace(step=0, serial=1)) + bytes(2 * ROW_BYTES))
    if data.draw(st.booleans()):
        answer[data.draw(st.integers(0, HEADER_BYTES - 1))] ^= data.draw(st.integers(1, 255))
    else:
        answer = bytearray(data.draw(st.binary(max_size=300)))
    rank = Attention(0, deadline_s=5)
    rank.dispatcher.install(
        Topology(MAP, {0: SlotAddress("life", HOST, 1, None)}, SECRET), [Connection(0, "life", ours)]
    )
    ticket = rank.dispatcher.dispatch(torch.randn(2, WIDTH), torch.zeros(2, 1, dtype=torch.int64), LAYER)

    def reply() -> None:
        theirs.sendall(answer)
        theirs.shutdown(socket.SHUT_WR)

    replying = threading.Thread(target=reply)
    replying.start()
    y_TKD = rank.dispatcher.combine(ticket)
    replying.join(5)
    assert not y_TKD.any() and rank.dispatcher.take_lost(2) == {0, 1}
    assert [slot for slot, _, _ in rank.losses] == [0]
    rank.close()
    theirs.close()


def test_a_right_answer_by_the_same_way_is_taken() -> None:
    """So that the test above fails for the right reason."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    rank = Attention(0, deadline_s=5)
    rank.dispatcher.install(
        Topology(MAP, {0: SlotAddress("life", HOST, 1, None)}, SECRET), [Connection(0, "life", ours)]
    )
    ticket = rank.dispatcher.dispatch(torch.randn(2, WIDTH), torch.zeros(2, 1, dtype=torch.int64), LAYER)
    asked = decode_header(memoryview(rows_message([(3, 2)])), dtype=1, row_bytes=ROW_BYTES, max_entries=8)
    y_TD = torch.randn(2, WIDTH)
    theirs.sendall(encode_answer(asked._replace(step=0, serial=1)) + y_TD.numpy().tobytes())
    assert torch.equal(rank.dispatcher.combine(ticket)[:, 0], y_TD)
    rank.close()
    theirs.close()
