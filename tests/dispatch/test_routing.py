"""Shape legend: T tokens, K top-k, N = T*K rows, D hidden width, E logical experts, S slots."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatch.expert_map import ExpertMap
from dispatch.local import LocalDispatcher
from dispatch.routing import HolderTable, by_expert, index_within_group, route
from tests.dispatch.members import RowwiseExperts

CPU = torch.device("cpu")


@st.composite
def routings(draw):
    """expert_ids_TK, an expert map over slots with gaps, those slots, and the start of the round-robin."""
    num_experts = draw(st.integers(1, 9))
    slots = draw(st.lists(st.integers(0, 20), min_size=1, max_size=5, unique=True))
    holders = st.lists(st.sampled_from(slots), min_size=1, max_size=len(slots), unique=True).map(tuple)
    experts = tuple(draw(holders) for _ in range(num_experts))
    tokens, top_k = draw(st.integers(0, 12)), draw(st.integers(1, 4))
    ids = draw(st.lists(st.integers(0, num_experts - 1), min_size=tokens * top_k, max_size=tokens * top_k))
    ids_TK = torch.tensor(ids, dtype=draw(st.sampled_from([torch.int32, torch.int64]))).view(tokens, top_k)
    return ids_TK, ExpertMap(0, {4: experts}), slots, draw(st.integers(0, 5))


@given(routings())
@settings(max_examples=150, deadline=None)
def test_route(routing):
    ids_TK, expert_map, slots, first_holder = routing
    way = route(ids_TK, HolderTable.of(expert_map, 4, slots, CPU), first_holder)
    expert_N = ids_TK.reshape(-1).tolist()

    assert sorted(way.order_N.tolist()) == list(range(len(expert_N)))
    assert way.rows_per_slot == way.counts_SE.sum(1).tolist()
    assert way.counts_SE.sum(0).tolist() == [expert_N.count(expert) for expert in range(expert_map.num_experts)]

    # Rows travel by (slot, expert), in row order within; replicas take turns from first_holder on.
    place, turns = 0, [0] * expert_map.num_experts
    slot_of_row = {}
    for row, expert in enumerate(expert_N):
        holders = expert_map.holders(4, expert)
        slot_of_row[row] = holders[(turns[expert] + first_holder) % len(holders)]
        turns[expert] += 1
    for s, slot in enumerate(slots):
        for expert in range(expert_map.num_experts):
            rows = [row for row, e in enumerate(expert_N) if e == expert and slot_of_row[row] == slot]
            assert way.order_N[place : place + len(rows)].tolist() == rows
            assert way.counts_SE[s, expert] == len(rows)
            place += len(rows)
    for expert in range(expert_map.num_experts):
        shares = [int(way.counts_SE[slots.index(slot), expert]) for slot in expert_map.holders(4, expert)]
        assert max(shares) - min(shares) <= 1

    x_TD = torch.arange(ids_TK.shape[0] * 3, dtype=torch.float32).view(-1, 3)
    y_TKD = way.unpermute(way.permute(x_TD))
    assert torch.equal(y_TKD, x_TD[:, None, :].expand(-1, ids_TK.shape[1], -1))


def test_many_senders_of_one_row_use_all_replicas():
    table = HolderTable.of(ExpertMap(0, {0: ((0, 1, 2),)}), 0, (0, 1, 2), CPU)
    ways = [route(torch.tensor([[0]]), table, sender) for sender in range(6)]
    assert torch.stack([way.counts_SE[:, 0] for way in ways]).sum(0).tolist() == [2, 2, 2]


def test_a_holder_outside_the_world_is_named():
    with pytest.raises(ValueError, match=r"slots\[0\]\[1\] names slot 7"):
        HolderTable.of(ExpertMap(0, {0: ((0,), (7,))}), 0, (0, 1), CPU)


@given(st.lists(st.integers(0, 4), max_size=30))
def test_index_within_group(groups):
    index_N = index_within_group(torch.tensor(groups, dtype=torch.int64), 5)
    assert index_N.tolist() == [groups[:row].count(group) for row, group in enumerate(groups)]


@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=4))
def test_by_expert(counts):
    order_N = by_expert(torch.tensor(counts)).tolist()
    runs = [(expert, source, n) for source, row in enumerate(counts) for expert, n in enumerate(row)]
    arrived = [(expert, source, j) for expert, source, n in runs for j in range(n)]
    assert [arrived[place] for place in order_N] == sorted(arrived)


@given(routings())
@settings(max_examples=50, deadline=None)
def test_local_dispatcher_computes_each_row_with_its_expert(routing):
    ids_TK, expert_map, _, _ = routing
    experts, x_TD = RowwiseExperts(), torch.randn(ids_TK.shape[0], 6)
    dispatcher = LocalDispatcher(experts, expert_map.num_experts)
    y_TKD = dispatcher.combine(dispatcher.dispatch(x_TD, ids_TK, 4))
    assert y_TKD.shape == (*ids_TK.shape, 6)
    for token, chosen in enumerate(ids_TK.tolist()):
        for k, expert in enumerate(chosen):
            assert torch.equal(y_TKD[token, k], experts(4, x_TD[token : token + 1], [expert], [1])[0])


def test_local_ticket_combines_once():
    dispatcher = LocalDispatcher(RowwiseExperts(), 2)
    ticket = dispatcher.dispatch(torch.ones(1, 4), torch.tensor([[1]]), 0)
    dispatcher.combine(ticket)
    with pytest.raises(ValueError, match="combined already"):
        dispatcher.combine(ticket)
