"""Which slot holds which expert, and what Ray is asked to reserve."""

from __future__ import annotations

import doctest
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import cluster.packing
import cluster.placement
from cluster.config import ConfigError, DeploymentConfig
from cluster.holdings import Holdings, cost, survives
from cluster.placement import RoleBundles, assign_experts, bundles, plan_experts, resize, without
from tests.cluster.checks import check_nodes, check_seats, table


def config(**sections: object) -> DeploymentConfig:
    return DeploymentConfig.model_validate({"model": {"path": "tiny"}, **sections})


def test_the_worked_examples() -> None:
    for module, examples in ((cluster.placement, 8), (cluster.packing, 1)):
        result = doctest.testmod(module)
        assert result.attempted >= examples and result.failed == 0


def test_slots_keep_their_numbers() -> None:
    assert assign_experts(4, (2, 7), None) == {2: (0, 1), 7: (2, 3)}


@given(st.integers(1, 130), st.integers(1, 40))
def test_an_even_split_differs_by_one_at_most(experts: int, actors: int) -> None:
    assignment = assign_experts(experts, range(actors), None)
    sizes = [len(held) for held in assignment.values()]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1
    assert {expert for held in assignment.values() for expert in held} == set(range(experts))
    if actors <= experts:
        assert [expert for slot in range(actors) for expert in assignment[slot]] == list(range(experts))


@given(st.data())
def test_seats_become_replicas_on_different_slots(data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 64))
    per_actor = data.draw(st.integers(1, experts))
    actors = data.draw(st.integers(-(-experts // per_actor), 2 * experts + 3))
    assignment = assign_experts(experts, range(actors), per_actor)
    copies = Counter(expert for held in assignment.values() for expert in held)
    assert all(len(held) == len(set(held)) == per_actor for held in assignment.values())
    assert set(copies) == set(range(experts))
    assert max(copies.values()) - min(copies.values()) <= 1


def test_more_per_actor_than_exist() -> None:
    with pytest.raises(ConfigError, match=r"^experts.per_actor \(17\) must be at most the 16 experts of a layer$"):
        assign_experts(16, range(2), 17)


@pytest.mark.parametrize(
    ("actors", "per_actor", "replicas", "sentence"),
    [
        (2, 4, 1, "experts.actors (2) must be at least 4: with experts.per_actor 4 there are 8 seats for 16 experts"),
        (
            4,
            6,
            2,
            "experts.actors (4) must be at least 6: with experts.per_actor 6 there are 24 seats for 16 experts with 2 "
            "holders each",
        ),
        (
            2,
            None,
            3,
            "experts.actors (2) must be at least experts.replicas (3): the holders of an expert are different actors",
        ),
    ],
)
def test_too_few_seats(actors: int, per_actor: int | None, replicas: int, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        assign_experts(16, range(actors), per_actor, replicas)
    assert str(caught.value) == sentence


@st.composite
def rooms(draw: st.DrawFn, slots: Sequence[int], replicas: int, num_experts: int) -> int | None:
    """`experts.per_actor`: None, or any number of seats that is enough for that many slots."""
    least = -(-num_experts * replicas // len(slots))
    return draw(st.none() | st.integers(least, num_experts))


SLOTS = st.lists(st.integers(0, 20), min_size=1, max_size=9, unique=True)


@given(st.data(), st.integers(1, 40), SLOTS)
def test_with_two_holders_each_any_actor_can_be_lost(data: st.DataObject, num_experts: int, slots: list[int]) -> None:
    assume(len(slots) >= 2)
    replicas = data.draw(st.integers(2, len(slots)))
    seats = data.draw(rooms(slots, replicas, num_experts))
    plan = table(num_experts, slots, seats, replicas)
    check_seats(plan, slots, seats, replicas)
    assert all(survives(plan, lost) for lost in ({slot} for slot in slots))


@given(st.data(), st.integers(1, 40), SLOTS)
def test_and_any_node_where_the_others_have_the_seats(data: st.DataObject, num_experts: int, slots: list[int]) -> None:
    assume(len(slots) >= 2)
    nodes = {slot: data.draw(st.sampled_from("abc")) for slot in slots}
    replicas = data.draw(st.integers(2, len(slots)))
    seats = data.draw(rooms(slots, replicas, num_experts))
    assignment = assign_experts(num_experts, slots, seats, replicas, nodes)
    plan = Holdings({slot: {0: held} for slot, held in assignment.items()})
    check_seats(plan, slots, seats, replicas)
    check_nodes(plan, nodes)


def test_the_plan_has_every_moe_layer_and_epoch_zero() -> None:
    plan = plan_experts(config(experts={"actors": 3, "per_actor": 2}), 4, [1, 3])
    assert plan.epoch == 0
    assert plan.layers == (1, 3)
    assert plan.holders(1, 0) == (0, 2)
    assert plan.holders(3, 3) == (1,)
    assert plan.experts_of(2) == {1: (0, 1), 3: (0, 1)}


def test_the_plan_has_the_replicas_that_are_asked_for() -> None:
    plan = plan_experts(config(experts={"actors": 4, "replicas": 2}), 16, [0, 1])
    assert [plan.holders(1, expert) for expert in (0, 7, 8, 15)] == [(0, 2), (0, 2), (1, 3), (1, 3)]
    nodes = {0: "a", 1: "a", 2: "a", 3: "b"}
    plan = plan_experts(config(experts={"actors": 4, "replicas": 2}), 16, [0, 1], nodes)
    assert plan.experts_of(3) == {0: tuple(range(8, 16)), 1: tuple(range(8, 16))}


def test_a_slot_more_takes_its_share_and_nothing_else_moves() -> None:
    before = table(16, range(2), None, 1)
    after = resize(before, range(4), None, 1)
    check_seats(after, range(4), None, 1)
    assert {copy.slot for copy in cost(before, after).loads} == {2, 3}
    assert len(cost(before, after).loads) == 2 * 8


def test_a_slot_less_leaves_its_share_to_the_others() -> None:
    before = table(16, range(4), None, 1)
    after = resize(before, (0, 1, 3), None, 1)
    check_seats(after, (0, 1, 3), None, 1)
    assert {(copy.layer, copy.expert) for copy in cost(before, after).loads} == {
        (layer, expert) for layer in (0, 1) for expert in before.held(2, 0)
    }


@given(st.data(), st.integers(1, 40), SLOTS)
def test_growth_moves_the_new_slots_share(data: st.DataObject, num_experts: int, slots: list[int]) -> None:
    replicas = data.draw(st.integers(1, len(slots)))
    assume(num_experts * replicas > len(slots))
    before = table(num_experts, slots, None, replicas)
    after = resize(before, [*slots, 30], None, replicas)
    check_seats(after, [*slots, 30], None, replicas)
    share = -(-num_experts * replicas // (len(slots) + 1))
    assert {copy.slot for copy in cost(before, after).loads} == {30}
    assert len(cost(before, after).loads) <= len(before.layers) * share


@given(st.data(), st.integers(1, 40), SLOTS)
def test_shrinking_loads_what_the_slot_held_again(data: st.DataObject, num_experts: int, slots: list[int]) -> None:
    assume(len(slots) >= 2)
    replicas = data.draw(st.integers(1, len(slots) - 1))
    assume(num_experts * replicas >= len(slots))
    before = table(num_experts, slots, None, replicas)
    gone = data.draw(st.sampled_from(slots))
    after = without(before, gone, None, replicas)
    check_seats(after, [slot for slot in slots if slot != gone], None, replicas)
    held = sum(len(before.held(gone, layer)) for layer in before.layers)
    # Each copy again, and for each at most one that had to make way for it.
    assert held <= len(cost(before, after).loads) <= 2 * held


@given(st.data(), st.integers(1, 24), SLOTS, SLOTS)
def test_any_set_of_slots_to_any_other(
    data: st.DataObject, num_experts: int, slots: list[int], others: list[int]
) -> None:
    replicas = data.draw(st.integers(1, min(len(slots), len(others))))
    before = table(num_experts, slots, data.draw(rooms(slots, replicas, num_experts)), replicas, layers=3)
    seats = data.draw(rooms(others, replicas, num_experts))
    loads_E = st.lists(st.floats(0, 1e6), min_size=num_experts, max_size=num_experts)
    loads = data.draw(st.none() | st.fixed_dictionaries(dict.fromkeys(before.layers, loads_E)))
    after = resize(before, others, seats, replicas, loads=loads)
    check_seats(after, others, seats, replicas)
    assert resize(after, others, seats, replicas, loads=loads) == after


@given(st.data(), st.integers(1, 24), SLOTS, SLOTS)
def test_resizing_keeps_copies_on_two_nodes(
    data: st.DataObject, num_experts: int, slots: list[int], others: list[int]
) -> None:
    assume(len(slots) >= 2 and len(others) >= 2)
    replicas = data.draw(st.integers(2, min(3, len(slots), len(others))))
    nodes = {slot: data.draw(st.sampled_from("abc")) for slot in others}
    seats = data.draw(rooms(others, replicas, num_experts))
    after = resize(table(num_experts, slots, None, replicas), others, seats, replicas, nodes)
    check_seats(after, others, seats, replicas)
    check_nodes(after, nodes)


def test_hot_experts_keep_their_copies_when_slots_come_and_go() -> None:
    before = Holdings({0: {0: (0, 1, 2)}, 1: {0: (0, 3, 4)}, 2: {0: (0, 5, 6)}})
    after = resize(before, (0, 1, 2, 3), seats=3, replicas=1)
    assert [copy.slot for copy in cost(before, after).loads] == [3, 3, 3] and not cost(before, after).drops
    loads = {0: (70, 5, 5, 5, 5, 5, 5)}
    fewer = resize(before, (0, 1), seats=4, replicas=1, loads=loads)
    assert fewer.holders[0][0] == (0, 1) and not cost(before, fewer).loads[2:]


def test_with_fewer_seats_the_hottest_keep_their_copies() -> None:
    before = Holdings({0: {0: (0, 1, 2)}, 1: {0: (0, 1, 3)}, 2: {0: (0, 2, 3)}})
    after = resize(before, (0, 1, 2), seats=2, replicas=1, loads={0: (70, 10, 10, 10)})
    assert list(map(len, after.holders[0])) == [3, 1, 1, 1]
    assert not cost(before, after).loads


def test_a_copy_too_many_goes_from_the_fullest_slot() -> None:
    before = Holdings({0: {0: (0, 1, 4)}, 1: {0: (0, 1, 2, 3)}})
    after = resize(before, (0, 1), seats=3, replicas=1)
    assert not cost(before, after).loads and [copy.slot for copy in cost(before, after).drops] == [1]


def test_a_new_slot_takes_what_leaves_copies_on_two_nodes() -> None:
    nodes = {0: "b", 1: "c", 2: "a", 3: "b"}
    before = table(4, range(3), None, 2)
    after = resize(before, range(4), None, 2, nodes)
    check_nodes(after, nodes)
    assert [copy.slot for copy in cost(before, after).loads] == [3, 3, 3, 3]


def test_a_second_node_is_worth_more_than_a_hot_experts_third_copy() -> None:
    # Expert 2 would take a seat on each slot; then a loss of node a would leave an expert without a holder.
    nodes = {0: "a", 1: "b", 2: "b", 3: "a", 4: "a"}
    before = Holdings({0: {0: (0, 1, 2, 3)}, 1: {0: (0, 1, 2, 3)}})
    after = resize(before, range(5), 2, 2, nodes, loads={0: (2, 1, 20, 1)})
    check_seats(after, range(5), 2, 2)
    check_nodes(after, nodes)


def test_a_slot_that_does_not_exist_cannot_be_drained() -> None:
    with pytest.raises(ValueError, match=r"^there is no slot 4; the slots are 0, 1$"):
        without(table(4, range(2), None, 1), 4, None, 1)


def test_bundles_say_what_each_actor_reserves() -> None:
    deployment = config(
        attention={"actors": 2, "num_cpus": 4, "num_gpus": 1, "strategy": "STRICT_SPREAD"},
        experts={"actors": 1, "num_cpus": 0, "num_gpus": 1, "resources": {"fast": 0.5}},
    )
    assert bundles(deployment) == {
        "attention": RoleBundles(({"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0, "GPU": 1.0}), "STRICT_SPREAD"),
        "experts": RoleBundles(({"GPU": 1.0, "fast": 0.5},), "PACK"),
    }
