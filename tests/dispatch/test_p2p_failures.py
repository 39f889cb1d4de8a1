"""A slot that dies, stands still, lies or refuses: its rows go to another holder, or are named as lost."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dispatch.epoch import GroupBroken
from dispatch.expert_map import ExpertMap
from dispatch.faults import Fault
from dispatch.topology import Topology
from tests.dispatch import p2p_world
from tests.dispatch.members import NUM_EXPERTS, WIDTH, RowwiseExperts
from tests.dispatch.p2p_world import SECRET, Attention, Servers, process, settled
from tests.dispatch.pool import Pool
from tests.dispatch.test_p2p import batch, expected

LAYER = 1
BOTH = ExpertMap(1, {LAYER: tuple((0, 1) for _ in range(NUM_EXPERTS))})
APART = ExpertMap(1, {LAYER: tuple((expert % 2,) for expert in range(NUM_EXPERTS))})

pytestmark = pytest.mark.usefixtures("way")


@pytest.fixture
def servers() -> Iterator[Servers]:
    made = Servers()
    yield made
    made.close()


def ask(rank: Attention, tokens: int = 24, top_k: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Results, what they should be, and the experts asked; a step of its own."""
    x_TD, ids_TK = batch(tokens, top_k, seed)
    rank.gate.begin(tokens, leaving=False)
    return rank.dispatcher.combine(rank.dispatcher.dispatch(x_TD, ids_TK, LAYER)), expected(x_TD, ids_TK, LAYER), ids_TK


def assert_lost(rank: Attention, y_TKD: Tensor, wanted_TKD: Tensor, ids_TK: Tensor, slot: int) -> None:
    """The rows of the slot's experts, and no others, are zeros, and their tokens are named once."""
    gone_TK = ids_TK % 2 == slot
    assert gone_TK.any() and not gone_TK.all()
    assert torch.equal(y_TKD[~gone_TK], wanted_TKD[~gone_TK]) and not y_TKD[gone_TK].any()
    tokens = len(ids_TK)
    assert rank.dispatcher.take_lost(tokens) == frozenset(gone_TK.any(1).nonzero().flatten().tolist())
    assert rank.dispatcher.take_lost(tokens) == frozenset()


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("expert_map", [BOTH, APART])
def test_a_killed_or_stopped_server(servers: Servers, expert_map: ExpertMap, signal_number: signal.Signals) -> None:
    rank = Attention(0, deadline_s=0.5)
    with process(0, expert_map) as (pid, address):
        topology = Topology(expert_map, {0: address, 1: servers.start(1, expert_map)}, SECRET)
        rank.adopt(topology)
        y_TKD, wanted_TKD, _ = ask(rank)
        assert torch.equal(y_TKD, wanted_TKD)
        os.kill(pid, signal_number)
        start = time.monotonic()
        y_TKD, wanted_TKD, ids_TK = ask(rank, seed=1)
        took = time.monotonic() - start
        assert took < 10 and (signal_number == signal.SIGKILL or took >= 0.5)
        assert [(slot, life) for slot, life, _ in rank.losses] == [(0, address.incarnation)]
        if expert_map is BOTH:
            assert torch.equal(y_TKD, wanted_TKD) and rank.dispatcher.take_lost(24) == frozenset()
            assert rank.dispatcher.stats.resent_rows or signal_number == signal.SIGKILL
        else:
            assert_lost(rank, y_TKD, wanted_TKD, ids_TK, slot=0)
        assert set(rank.dispatcher.connected) == {1}
    rank.close()


@pytest.mark.parametrize("action", ["kill", "stop", "drop", "corrupt"])
def test_a_server_that_fails_in_the_middle_of_a_step(servers: Servers, action: str) -> None:
    script = [Fault(action, "expert", 0, step=3, layer=LAYER)]  # type: ignore[arg-type]
    rank = Attention(0, deadline_s=0.5)
    with process(0, BOTH, script) as (_, address):
        rank.adopt(Topology(BOTH, {0: address, 1: servers.start(1, BOTH)}, SECRET))
        for seed in range(6):
            y_TKD, wanted_TKD, _ = ask(rank, seed=seed)
            assert torch.equal(y_TKD, wanted_TKD)
            assert len(rank.losses) == (seed >= 2)
        assert rank.dispatcher.stats.resent_rows > 0 and rank.dispatcher.take_lost(24) == frozenset()
    rank.close()


@pytest.mark.parametrize("action", ["drop", "corrupt"])
def test_messages_that_fail_on_the_way_out(servers: Servers, action: str) -> None:
    rank = Attention(5, deadline_s=0.4, script=[Fault(action, "attention", 5, step=2)])  # type: ignore[arg-type]
    rank.adopt(Topology(BOTH, {slot: servers.start(slot, BOTH) for slot in (0, 1)}, SECRET))
    for seed in range(4):
        y_TKD, wanted_TKD, _ = ask(rank, seed=seed)
        assert torch.equal(y_TKD, wanted_TKD)
    assert len(rank.losses) == 1 and rank.dispatcher.stats.resent_rows > 0
    rank.close()


@pytest.mark.parametrize("expert_map", [BOTH, APART])
def test_a_server_killed_between_two_micro_batches(servers: Servers, expert_map: ExpertMap) -> None:
    """What each has lost is told apart, though they have other numbers of tokens."""
    rank = Attention(0)
    with process(0, expert_map, [Fault("stop", "expert", 0, step=1)]) as (pid, address):
        rank.adopt(Topology(expert_map, {0: address, 1: servers.start(1, expert_map)}, SECRET))
        batches = [batch(tokens, 2, seed) for tokens, seed in ((24, 0), (9, 1))]
        rank.gate.begin(33, leaving=False)
        first = rank.dispatcher.dispatch(*batches[0], LAYER)  # its part on slot 0 is never answered
        os.kill(pid, signal.SIGKILL)
        tickets = [first, rank.dispatcher.dispatch(*batches[1], LAYER)]
        for ticket, (x_TD, ids_TK) in zip(tickets, batches, strict=True):
            y_TKD, wanted_TKD = rank.dispatcher.combine(ticket), expected(x_TD, ids_TK, LAYER)
            if expert_map is BOTH:
                assert torch.equal(y_TKD, wanted_TKD) and not rank.dispatcher.take_lost(len(x_TD))
            else:
                assert_lost(rank, y_TKD, wanted_TKD, ids_TK, slot=0)
        assert len(rank.losses) == 1
    rank.close()


def test_delays_within_the_deadline_lose_nothing(servers: Servers) -> None:
    late = [Fault("delay", "expert", 0, seconds=0.1, times=2), Fault("delay", "attention", 0, seconds=0.1)]
    rank = Attention(0, deadline_s=1, script=late)
    rank.adopt(Topology(BOTH, {slot: servers.start(slot, BOTH, script=late) for slot in (0, 1)}, SECRET))
    start = time.monotonic()
    for seed in range(3):
        y_TKD, wanted_TKD, _ = ask(rank, seed=seed)
        assert torch.equal(y_TKD, wanted_TKD)
    assert time.monotonic() - start >= 0.3 and not rank.losses
    rank.close()


def test_all_servers_gone_and_back(servers: Servers) -> None:
    """A new life at the same slot is taken up, and renewal is announced."""
    rank = Attention(0)
    rank.adopt(Topology(APART, {slot: servers.start(slot, APART) for slot in (0, 1)}, SECRET))
    for slot in (0, 1):
        servers.stop(slot)
    y_TKD, _, _ = ask(rank, top_k=1)
    assert not y_TKD.any() and rank.dispatcher.take_lost(24) == frozenset(range(24))
    assert not rank.gate.begin(0, leaving=False).renewed
    later = replace(APART, epoch=2)
    answer = rank.adopt(Topology(later, {slot: servers.start(slot, later) for slot in (0, 1)}, SECRET))
    assert answer.renewed and answer.idle
    y_TKD, wanted_TKD, _ = ask(rank)
    assert torch.equal(y_TKD, wanted_TKD) and rank.dispatcher.take_lost(24) == frozenset()
    rank.close()


def test_a_token_is_named_for_batches_of_several_rows_a_token(servers: Servers) -> None:
    """T * K rows of one expert each, as the MoE layer sends them when scores go on the input."""
    rank = Attention(0)
    rank.adopt(Topology(APART, {0: servers.start(0, APART)}, SECRET))
    rank.gate.begin(3, leaving=False)
    ids_N1 = torch.tensor([[0], [2], [0], [1], [4], [6]])  # 3 tokens, 2 rows each
    rank.dispatcher.combine(rank.dispatcher.dispatch(torch.randn(6, WIDTH), ids_N1, LAYER))
    assert rank.dispatcher.take_lost(3) == {1}
    rank.close()


def test_a_stale_epoch_and_experts_not_held_go_elsewhere(servers: Servers) -> None:
    rank = Attention(0)
    rank.adopt(Topology(BOTH, {slot: servers.start(slot, BOTH) for slot in (0, 1)}, SECRET))
    servers[0].allow(BOTH.experts_of(0), min_epoch=2)
    y_TKD, wanted_TKD, _ = ask(rank)
    assert torch.equal(y_TKD, wanted_TKD) and servers[0].stats.refused == 1
    servers[0].allow({LAYER: (0, 1, 2)}, min_epoch=1)
    y_TKD, wanted_TKD, _ = ask(rank, seed=1)
    assert torch.equal(y_TKD, wanted_TKD) and servers[0].stats.refused == 2
    servers[1].allow({}, min_epoch=1)
    y_TKD, _, _ = ask(rank, top_k=8)
    assert len(rank.dispatcher.take_lost(24)) == 24 and not y_TKD.any()
    assert not rank.losses and set(rank.dispatcher.connected) == {0, 1}
    rank.close()


def test_experts_that_raise_count_as_lost(servers: Servers, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(RowwiseExperts):
        def __call__(self, *_: object) -> Tensor:  # type: ignore[override]
            raise RuntimeError("out of order")

    rank = Attention(0)
    addresses = {0: servers.start(0, BOTH, experts=Broken()), 1: servers.start(1, BOTH)}
    rank.adopt(Topology(BOTH, addresses, SECRET))
    y_TKD, wanted_TKD, _ = ask(rank)
    assert torch.equal(y_TKD, wanted_TKD)
    assert [slot for slot, _, _ in rank.losses] == [0] and "out of order" in caplog.text
    rank.adopt(Topology(BOTH, addresses, SECRET))  # its server lives on and can be tried again
    assert set(rank.dispatcher.connected) == {0, 1}
    rank.close()


def test_a_stopped_server_does_not_hold_up_the_engine(servers: Servers) -> None:
    rank = Attention(0, connect_timeout_s=1)
    with process(0, BOTH) as (pid, address):
        os.kill(pid, signal.SIGSTOP)
        topology = Topology(BOTH, {0: address, 1: servers.start(1, BOTH)}, SECRET)
        installed = rank.gate.adopt(topology)
        start = time.monotonic()
        rank.gate.begin(0, leaving=False)
        assert time.monotonic() - start < 0.5
        rank.gate.wait()
        assert rank.gate.begin(0, leaving=False).renewed and installed.done()
        assert set(rank.dispatcher.connected) == {1}
        os.kill(pid, signal.SIGCONT)
        rank.adopt(topology)
        assert set(rank.dispatcher.connected) == {0, 1}
    rank.close()


def test_an_older_topology_is_ignored(servers: Servers) -> None:
    rank = Attention(0)
    addresses = {slot: servers.start(slot, BOTH) for slot in (0, 1)}
    rank.adopt(Topology(replace(BOTH, epoch=5), {0: addresses[0]}, SECRET))
    assert not rank.adopt(Topology(replace(BOTH, epoch=4), addresses, SECRET)).renewed
    assert rank.dispatcher.epoch == 5 and set(rank.dispatcher.connected) == {0}
    rank.adopt(Topology(replace(BOTH, epoch=6), {1: addresses[1]}, SECRET))
    assert rank.dispatcher.epoch == 6 and set(rank.dispatcher.connected) == {1}
    rank.close()


def test_a_topology_may_come_while_a_batch_is_under_way(servers: Servers) -> None:
    rank = Attention(0)
    addresses = {slot: servers.start(slot, BOTH) for slot in (0, 1)}
    rank.adopt(Topology(BOTH, addresses, SECRET))
    x_TD, ids_TK = batch(20, 2, 0)
    ticket = rank.dispatcher.dispatch(x_TD, ids_TK, LAYER)
    rank.adopt(Topology(replace(BOTH, epoch=2), {1: addresses[1]}, SECRET))
    assert torch.equal(rank.dispatcher.combine(ticket), expected(x_TD, ids_TK, LAYER))
    assert not rank.losses
    rank.close()


def _reconnect(_: int, way: str) -> list[tuple[int, int]]:
    """Descriptors and threads after ten connections, and after two hundred more."""
    p2p_world.use(way)
    servers, rank = Servers(), Attention(0)
    addresses = {slot: servers.start(slot, BOTH) for slot in (0, 1)}

    def turn(epoch: int) -> None:
        live = {epoch % 2: addresses[epoch % 2]}
        rank.adopt(Topology(replace(BOTH, epoch=epoch), live, SECRET))
        y_TKD, wanted_TKD, _ = ask(rank, tokens=3)
        assert torch.equal(y_TKD, wanted_TKD)

    counts = []
    for epochs in (range(1, 11), range(11, 211)):
        for epoch in epochs:
            turn(epoch)
        counts.append(settled())
    rank.close()
    servers.close()
    return counts


def test_nothing_leaks_over_many_reconnections(alone: Pool, way: str) -> None:
    [[(fds, threads), (fds_after, threads_after)]] = alone.run(1, _reconnect, way, timeout_s=200)
    assert abs(fds_after - fds) <= 2
    assert threads_after <= threads + 4


def test_the_gate_leaves_and_has_no_recovery() -> None:
    rank = Attention(0)
    answer = rank.gate.begin(3, leaving=True)
    assert answer.leaving and not answer.idle
    with pytest.raises(GroupBroken):
        rank.gate.recover(GroupBroken(1, "testing", "broken"))
    rank.close()
