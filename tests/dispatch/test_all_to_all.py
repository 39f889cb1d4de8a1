"""Worlds of real gloo processes against LocalDispatcher. Shape legend: T tokens, K top-k, D hidden width."""

import itertools
import os
import pickle
import re
import signal
import threading
import time

import pytest
import torch

from dispatch.all_to_all import AllToAllDispatcher, ExpertRank
from dispatch.epoch import GroupBroken, StaleEpoch, World
from dispatch.expert_map import ExpertMap
from dispatch.groups import EpochGroup
from dispatch.local import LocalDispatcher
from tests.dispatch.members import (
    LAYERS,
    NUM_EXPERTS,
    WIDTH,
    Case,
    RowwiseExperts,
    connect,
    form,
    make_batch,
    make_map,
    make_world,
    run_case,
    run_cases,
)

pytestmark = pytest.mark.cluster

CASES = [
    *(
        Case(top_k, pattern, dtype, copies)
        for top_k, pattern, (dtype, copies) in itertools.product(
            (1, 2, 8),
            ("random", "skewed", "one", "empty_ranks"),
            ((torch.float32, 1), (torch.float32, 2), (torch.bfloat16, 2)),
        )
    ),
    *(Case(top_k, "nothing") for top_k in (1, 8)),
    *(Case(top_k, "random", linear=True, copies=copies) for top_k in (1, 2, 8) for copies in (1, 2)),
]


@pytest.mark.parametrize(("attention", "slots"), [(1, 1), (1, 4), (2, 2), (3, 5)])
def test_equals_local(pool, port, epoch, attention, slots):
    results = pool.run(attention + slots, run_cases, make_world(attention, slots), epoch, port, CASES)
    for number, case in enumerate(CASES):
        for layer in LAYERS:
            sent = torch.tensor([rows[number][layer] for rows in results[:attention]]).sum(0)
            computed = torch.tensor([rows[number][layer] for rows in results[attention:]])
            assert torch.equal(sent, computed.sum(0))
            if case.pattern == "one" and case.copies == 2 and slots > 1:
                assert sum(bool(n) for n in computed[:, 5]) == 2, "both replicas work"


def _two_tickets(rank, world, epoch, port):
    group = form(rank, world, epoch, port)
    expert_map = make_map(epoch, world.slots, 2)
    if rank:
        ExpertRank(group, expert_map, world.slots[rank - 1], RowwiseExperts(), WIDTH, torch.float32).serve_step()
        group.close()
        return None
    dispatcher = AllToAllDispatcher(group, expert_map)
    batches = {layer: make_batch(Case(2, "random"), rank, 0, layer) for layer in LAYERS}
    tickets = {layer: dispatcher.dispatch(*batches[layer], layer) for layer in LAYERS}
    for layer in reversed(LAYERS):
        x_TD, ids_TK = batches[layer]
        y_TKD = dispatcher.combine(tickets[layer])
        oracle = LocalDispatcher(RowwiseExperts(), NUM_EXPERTS)
        assert torch.equal(y_TKD, oracle.combine(oracle.dispatch(x_TD, ids_TK, layer)))
    sizes = {layer: ids_TK.numel() * WIDTH * 4 for layer, (_, ids_TK) in batches.items()}
    assert dispatcher.stats.bytes_sent == dispatcher.stats.bytes_received == sum(sizes.values())
    assert 0 < dispatcher.stats.wait_s < 20
    with pytest.raises(ValueError, match="combined already"):
        dispatcher.combine(tickets[1])
    group.close()
    group.close()
    with pytest.raises(GroupBroken, match="closed"):
        dispatcher.dispatch(*batches[1], 1)
    return tickets[1].epoch


def test_two_tickets_at_once_each_combined_once(pool, port, epoch):
    assert pool.run(4, _two_tickets, World((0,), (0, 2, 3)), epoch, port)[0] == epoch


def _ticket_of_another_epoch(rank, world, epoch, port):
    groups = [form(rank, world, epoch + n, port) for n in range(2)]
    if rank:
        for group in groups:
            expert_map = make_map(group.epoch, world.slots, 1)
            ExpertRank(group, expert_map, 0, RowwiseExperts(), WIDTH, torch.float32).serve_layer(1)
    else:
        batch = make_batch(Case(1, "random"), 0, 0, 1)
        old, new = (AllToAllDispatcher(group, make_map(group.epoch, world.slots, 1)) for group in groups)
        ticket = old.dispatch(*batch, 1)
        new_ticket = new.dispatch(*batch, 1)
        with pytest.raises(StaleEpoch, match=f"epoch {epoch + 1}: .* of epoch {epoch}$"):
            new.combine(ticket)
        assert torch.equal(old.combine(ticket), new.combine(new_ticket))
        with pytest.raises(StaleEpoch, match="the map is of epoch"):
            AllToAllDispatcher(groups[0], make_map(epoch + 1, world.slots, 1))
        with pytest.raises(ValueError, match="names slot 2"):
            AllToAllDispatcher(groups[0], make_map(epoch, (0, 2), 1))
    for group in groups:
        group.close()


def test_a_ticket_of_another_epoch_is_refused(pool, port, epoch):
    pool.run(2, _ticket_of_another_epoch, World((0,), (0,)), epoch, port)


def _bad_header(rank, world, epoch, port, fault):
    group = form(rank, world, epoch, port)
    expert_map = make_map(epoch, world.slots, 1)
    x_TD, ids_TK = make_batch(Case(1, "random"), rank, 0, 1)
    message, start = None, time.monotonic()
    try:
        if rank == 1:
            ExpertRank(group, expert_map, 0, RowwiseExperts(), WIDTH, torch.float32).serve_layer(1)
        else:
            dispatcher = AllToAllDispatcher(group, expert_map)
            if fault == "epoch":
                group.epoch += 1
            if fault == "width":
                x_TD = x_TD[:, :5]
            dispatcher.combine(dispatcher.dispatch(x_TD, ids_TK, 3 if fault == "layer" else 1))
    except GroupBroken as error:
        message = f"{type(error).__name__}: {error}"
        group.close()  # with the traceback, and with it the dispatcher's frames, still alive
    return message, time.monotonic() - start


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("epoch", "StaleEpoch: epoch {0}: .* attention 0 sends epoch {1}, layer 1, .* expected epoch {0}, layer 1, "),
        ("layer", "GroupBroken: epoch {0}: .* attention 0 sends epoch {0}, layer 3, .* expected epoch {0}, layer 1, "),
        ("width", "GroupBroken: epoch {0}: .* attention 0 sends .* 20 bytes a row; expected .* 64 bytes a row"),
    ],
)
def test_counts_of_another_epoch_layer_or_width(pool, port, epoch, fault, words):
    (sender, sender_s), (slot, _) = pool.run(2, _bad_header, World((0,), (0,)), epoch, port, fault)
    assert re.search(words.format(epoch, epoch + 1), slot), slot
    assert sender.startswith("GroupBroken"), sender
    assert sender_s < 3, "the sender learns by the slot's leaving, not by its timeout"


def _leaves_with_a_ticket(rank, world, epoch, port):
    group = form(rank, world, epoch, port)
    expert_map = make_map(epoch, world.slots, 1)
    batch = make_batch(Case(8, "random"), rank, 0, 1)
    if rank == 0:
        dispatcher = AllToAllDispatcher(group, expert_map)
        dispatcher.dispatch(*batch, 1)
        group.close()
        time.sleep(2)  # the dispatcher stays
        return 0.0
    start = time.monotonic()
    with pytest.raises(GroupBroken):
        if rank == 1:
            dispatcher = AllToAllDispatcher(group, expert_map)
            for layer in LAYERS:
                dispatcher.combine(dispatcher.dispatch(*batch, layer))
        else:
            ExpertRank(group, expert_map, world.slots[rank - 2], RowwiseExperts(), WIDTH, torch.float32).serve_step()
    group.close()
    return time.monotonic() - start


def test_close_ends_the_connections_though_tickets_are_open(pool, port, epoch):
    assert max(pool.run(4, _leaves_with_a_ticket, make_world(2, 2), epoch, port)) < 1.5


class _Failing(RowwiseExperts):
    def __call__(self, *arguments):
        raise ArithmeticError("a scripted fault")


def _compute_fails(rank, world, epoch, port):
    group = form(rank, world, epoch, port)
    expert_map = make_map(epoch, world.slots, 1)
    start = time.monotonic()
    try:
        if rank == 3:
            ExpertRank(group, expert_map, world.slots[1], _Failing(), WIDTH, torch.float32).serve_layer(1)
        elif rank == 2:
            ExpertRank(group, expert_map, world.slots[0], RowwiseExperts(), WIDTH, torch.float32).serve_layer(1)
        else:
            dispatcher = AllToAllDispatcher(group, expert_map)
            dispatcher.combine(dispatcher.dispatch(*make_batch(Case(8, "random"), rank, 0, 1), 1))
    except (GroupBroken, ArithmeticError) as error:
        group.close()
        return type(error).__name__, time.monotonic() - start


def test_a_member_that_fails_and_leaves_frees_the_others(pool, port, epoch):
    results = pool.run(4, _compute_fails, make_world(2, 2), epoch, port)
    assert [name for name, _ in results] == ["GroupBroken", "GroupBroken", "GroupBroken", "ArithmeticError"]
    assert max(seconds for _, seconds in results) < 3


def _killed(rank, world, epoch, port, victim):
    """Serve until the victim dies; then form the next epoch's group of those who live, and run a case in it."""
    store = connect(port).meeting
    group = form(rank, world, epoch, port)
    run_case(group, Case(2, "random"))
    case = Case(2, "random", steps=10**6)
    if rank == victim:
        store.set(f"killed/{epoch}", str(time.monotonic() + 0.3))
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
    try:
        run_case(group, case)
    except GroupBroken as error:
        noticed = time.monotonic()
        message = str(error)
        group.close()
    latency = noticed - float(store.get(f"killed/{epoch}"))
    gone = world.name(victim).split()
    living = World(
        tuple(member for member in world.attention if gone != ["attention", str(member)]),
        tuple(slot for slot in world.slots if gone != ["slot", str(slot)]),
    )
    start = time.monotonic()
    group = form(rank - (rank > victim), living, epoch + 1, port)
    formed = time.monotonic() - start
    run_case(group, Case(2, "random", copies=2))
    group.close()
    return latency, formed, message


@pytest.mark.parametrize("victim", [0, 3])
def test_a_killed_member_ends_the_epoch_and_the_living_form_the_next(pool, port, epoch, victim):
    results = pool.run(4, _killed, make_world(2, 2), epoch, port, victim)
    assert results.pop(victim) is None
    for latency, formed, message in results:
        assert latency < 2, "the others notice at once"
        assert formed < 5
        assert message.startswith(f"epoch {epoch}: group broken while ")


def test_a_member_that_does_not_come(port, epoch):
    start = time.monotonic()
    with pytest.raises(GroupBroken, match=f"epoch {epoch}: group broken while forming as attention 0"):
        form(0, World((0,), (0,)), epoch, port, timeout_s=1)
    assert time.monotonic() - start < 5


def test_rejects_an_address_that_needs_a_resolver(port, epoch):
    with pytest.raises(ValueError, match="address must be an IP address"):
        EpochGroup.form(epoch, World((0,), (0,)), 0, connect(port), address="localhost", timeout_s=1)


@pytest.mark.skipif(torch.distributed.is_nccl_available(), reason="this torch has NCCL")
def test_nccl_without_nccl(port, epoch):
    world, device = World((0,), (0,)), torch.device("cuda")
    with pytest.raises(ValueError, match="built without NCCL"):
        EpochGroup.form(epoch, world, 0, connect(port), address="127.0.0.1", timeout_s=9, device=device)


@pytest.mark.parametrize(("attention", "slots"), [((), (0,)), ((0,), ()), ((0, 0), (1,)), ((0,), (1, 1))])
def test_world_rejects(attention, slots):
    with pytest.raises(ValueError, match="must be one or more different ids"):
        World(attention, slots)


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(StaleEpoch(3, "combining layer 1", "the ticket is of epoch 2")))
    assert type(error) is StaleEpoch
    assert str(error) == "epoch 3: group broken while combining layer 1: the ticket is of epoch 2"


def test_world_ranks():
    world = World((0, 4), (2, 9))
    assert world.size == 4
    assert [world.name(rank) for rank in range(4)] == ["attention 0", "attention 4", "slot 2", "slot 9"]
    assert world.attention_rank(4) == 1 and world.slot_rank(9) == 3


def test_expert_map_covers_the_case():
    assert make_map(0, (0, 2), 2) == ExpertMap(0, {layer: make_map(0, (0, 2), 2).slots[layer] for layer in LAYERS})
    assert make_map(0, (0, 2), 2).num_experts == NUM_EXPERTS
