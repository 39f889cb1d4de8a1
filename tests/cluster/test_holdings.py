"""What slots hold: the two views of it, who would be missed, one expert moved, what a change costs."""

from __future__ import annotations

import doctest
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cluster.holdings
from cluster.holdings import Copy, Holdings, cost, move, orphans, survives
from dispatch.expert_map import ExpertMap

# Layers 1 and 3 of four experts; slot 7 holds nothing yet.
FOUR = Holdings({0: {1: (0, 1), 3: (0, 1)}, 2: {1: (3, 2), 3: (2, 3)}, 5: {1: (0,)}, 7: {}})


@st.composite
def holdings(draw: st.DrawFn) -> Holdings:
    """Of 1 to 3 layers, 1 to 9 experts and 1 to 6 slots with gaps between their numbers; any number of replicas."""
    slots = draw(st.lists(st.integers(0, 20), min_size=1, max_size=6, unique=True))
    num_experts = draw(st.integers(1, 9))
    of_expert = st.lists(st.sampled_from(slots), min_size=1, unique=True).map(lambda slots: tuple(sorted(slots)))
    layers = {
        layer: tuple(draw(of_expert) for _ in range(num_experts))
        for layer in draw(st.lists(st.integers(0, 47), min_size=1, max_size=3, unique=True))
    }
    expert_map = ExpertMap(0, layers)
    return Holdings({slot: expert_map.experts_of(slot) for slot in slots})


def test_the_worked_examples() -> None:
    result = doctest.testmod(cluster.holdings)
    assert result.attempted >= 3 and result.failed == 0


def test_lookups() -> None:
    assert tuple(FOUR.slots) == (0, 2, 5, 7)
    assert FOUR.layers == (1, 3)
    assert FOUR.num_experts == 4
    assert FOUR.held(2, 1) == (2, 3)
    assert FOUR.held(5, 3) == FOUR.held(6, 1) == ()
    assert FOUR.holders[1] == ((0, 5), (0,), (2,), (2,))


@given(holdings(), st.integers(0, 9))
def test_there_and_back_again(table: Holdings, epoch: int) -> None:
    expert_map = table.to_map(epoch)
    assert expert_map.epoch == epoch
    for slot, held in table.slots.items():
        assert expert_map.experts_of(slot) == dict(held)
    idle = {slot: {} for slot, held in table.slots.items() if not held}
    assert Holdings({**Holdings.of(expert_map).slots, **idle}) == table


@given(holdings())
def test_travels_and_cannot_be_changed(table: Holdings) -> None:
    assert pickle.loads(pickle.dumps(table)) == table
    with pytest.raises(TypeError):
        table.slots[0] = {}  # type: ignore[index]


@pytest.mark.parametrize(
    ("slots", "words"),
    [
        ({0: {1: (0, 0)}}, r"slot 0 holds an expert of layer 1 twice: \(0, 0\)"),
        ({0: {1: (0, 2)}}, r"slots\[1\]\[1\]: no slot holds this expert"),
        ({0: {1: (0, 1), 3: (0,)}}, r"slots\[3\]\[1\]: no slot holds this expert"),
        ({0: {}}, "at least one layer"),
        ({-1: {1: (0,)}}, "different slots from 0 on"),
    ],
)
def test_rejects(slots: dict[int, dict[int, tuple[int, ...]]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Holdings(slots)


def test_orphans_are_what_only_the_lost_held() -> None:
    assert orphans(FOUR, {0}) == ((1, 1), (3, 0), (3, 1))
    assert orphans(FOUR, {0, 5}) == ((1, 0), (1, 1), (3, 0), (3, 1))
    assert survives(FOUR, {5, 7}) and survives(FOUR, ()) and not survives(FOUR, {2})


@given(holdings(), st.sets(st.integers(0, 20)))
def test_orphans_have_no_holder_among_the_rest(table: Holdings, lost: set[int]) -> None:
    pairs = {(layer, expert) for layer in table.layers for expert in range(table.num_experts)}
    living = {(copy.layer, copy.expert) for copy in table.copies() if copy.slot not in lost}
    assert set(orphans(table, lost)) == pairs - living
    assert survives(table, lost) == (pairs == living)


@given(holdings())
def test_the_cost_is_the_way_from_one_to_the_other(before: Holdings) -> None:
    expert = before.num_experts - 1
    after = Holdings({**before.slots, 30: {layer: (expert,) for layer in before.layers}})
    price = cost(before, after)
    assert price.loads == tuple(Copy(layer, expert, 30) for layer in before.layers) and price.drops == ()
    assert cost(after, before).drops == price.loads
    assert (before.copies() - set(price.drops)) | set(price.loads) == after.copies()
    assert set(cost(None, after).loads) == after.copies()


def test_a_move_goes_through_all_layers_or_one() -> None:
    assert cost(FOUR, move(FOUR, expert=1, to_slot=7)) == cost_of(
        loads=[(1, 1, 7), (3, 1, 7)], drops=[(1, 1, 0), (3, 1, 0)]
    )
    assert cost(FOUR, move(FOUR, 1, 7, layer=3)) == cost_of(loads=[(3, 1, 7)], drops=[(3, 1, 0)])


def test_a_move_leaves_the_fullest_holder_or_the_one_that_is_named() -> None:
    assert cost(FOUR, move(FOUR, 0, 2, layer=1)).drops == (Copy(1, 0, 0),)
    assert cost(FOUR, move(FOUR, 0, 2, layer=1, from_slot=5)).drops == (Copy(1, 0, 5),)
    even = Holdings({3: {1: (0, 1)}, 4: {1: (0, 1)}, 5: {}})
    assert cost(even, move(even, 0, 5)).drops == (Copy(1, 0, 3),)


def test_a_move_passes_over_layers_that_have_it_there() -> None:
    assert cost(FOUR, move(FOUR, 0, 5)) == cost_of(loads=[(3, 0, 5)], drops=[(3, 0, 0)])


def cost_of(loads: list[tuple[int, int, int]], drops: list[tuple[int, int, int]]) -> cluster.holdings.Cost:
    return cluster.holdings.Cost(tuple(Copy(*copy) for copy in loads), tuple(Copy(*copy) for copy in drops))


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"expert": 0, "to_slot": 1}, "there is no slot 1; the slots are 0, 2, 5, 7"),
        ({"expert": 0, "to_slot": 2, "from_slot": 9}, "there is no slot 9; the slots are 0, 2, 5, 7"),
        ({"expert": 4, "to_slot": 2}, "there is no expert 4; the experts are 0 to 3"),
        ({"expert": -1, "to_slot": 2}, "there is no expert -1; the experts are 0 to 3"),
        ({"expert": 0, "to_slot": 2, "layer": 2}, "layer 2 has no experts; the layers with experts are 1, 3"),
        ({"expert": 0, "to_slot": 0}, "slot 0 already holds expert 0 of layers 1, 3"),
        ({"expert": 0, "to_slot": 5, "layer": 1}, "slot 5 already holds expert 0 of layer 1"),
        ({"expert": 1, "to_slot": 5, "from_slot": 2}, "slot 2 holds no expert 1 of layers 1, 3 that slot 5 has not"),
    ],
)
def test_an_impossible_move_says_why(asked: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        move(FOUR, **asked)
    assert str(caught.value) == sentence
