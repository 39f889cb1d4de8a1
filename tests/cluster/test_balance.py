"""Even load: how it is measured, averaged over time, and made."""

from __future__ import annotations

import doctest
import math
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cluster.balance
from cluster.balance import Balance, LoadAverage, balancedness, rebalance
from cluster.config import ConfigError
from cluster.holdings import Holdings, cost, survives
from cluster.placement import assign_experts, resize
from tests.cluster.checks import check_nodes, check_seats, table


def skew(hot: tuple[int, ...], share: float, num_experts: int = 16) -> tuple[float, ...]:
    """Loads of one layer: `hot` experts have `share` of the tokens between them, the others the rest."""
    rest = (1 - share) / (num_experts - len(hot))
    return tuple(share / len(hot) if expert in hot else rest for expert in range(num_experts))


def test_the_worked_examples() -> None:
    result = doctest.testmod(cluster.balance)
    assert result.attempted >= 4 and result.failed == 0


def test_balancedness_by_layer_and_in_all() -> None:
    holdings = Holdings({0: {1: (0,), 3: (0,)}, 1: {1: (1,), 3: (1,)}})
    assert balancedness({1: (30, 10), 3: (10, 30)}, holdings) == Balance({1: 1.5, 3: 1.5}, 1.0)
    assert balancedness({1: (30, 10), 3: (0, 0)}, holdings) == Balance({1: 1.5, 3: 1.0}, 1.5)
    idle = Holdings({**holdings.slots, 2: {}, 3: {}})
    assert balancedness({1: (20, 20), 3: (5, 5)}, idle).total == 2.0


@pytest.mark.parametrize("seats", [5, 6])
@pytest.mark.parametrize("layers", [1, 4])
def test_two_hot_experts_of_sixteen(seats: int, layers: int) -> None:
    # Experts 8 and 9 have 60% of the tokens and stand on slot 1 alone, whichever the number of seats.
    current = table(16, range(4), seats, 1, layers=layers)
    loads = dict.fromkeys(range(layers), skew((8, 9), 0.6))
    assert balancedness(loads, current).total > 2.5
    after = rebalance(loads, range(4), seats, 1, None, current)
    assert balancedness(loads, after).total < 1.2
    assert max(balancedness(loads, after).layers.values()) < 1.2
    assert all(len(after.held(slot, layer)) == seats for slot in range(4) for layer in range(layers))
    # Once even, it stays: a second pass has nothing to do, nor has one after a little noise.
    assert rebalance(loads, range(4), seats, 1, None, after) is after
    noise = random.Random(0)
    near = {layer: [one * noise.uniform(0.95, 1.05) for one in loads_E] for layer, loads_E in loads.items()}
    assert rebalance(near, range(4), seats, 1, None, after) is after


def test_without_spare_seats_layers_make_up_for_each_other() -> None:
    # One expert has 40% in each layer, and nobody can take half of it: no layer is even, but all together are.
    current = table(16, range(4), None, 1, layers=8)
    loads = dict.fromkeys(range(8), skew((3,), 0.4))
    after = rebalance(loads, range(4), None, 1, None, current)
    assert min(balancedness(loads, after).layers.values()) >= 1.6
    assert balancedness(loads, after).total < 1.02


def test_what_need_not_move_stays() -> None:
    # Only expert 0 is hot; the spare seats of slots 2 and 3 are enough to share it out.
    current = table(16, range(4), None, 2, layers=3)
    loads = dict.fromkeys(range(3), skew((0,), 0.3))
    after = rebalance(loads, range(4), 9, 2, None, current)
    assert balancedness(loads, after).total < 1.05 < balancedness(loads, current).total
    assert len(cost(current, after).loads) <= 3 * 8


def test_maverick_on_32_slots_is_quick_and_even() -> None:
    draw = random.Random(7)
    loads = {layer: [1 / (1 + draw.randrange(128)) for _ in range(128)] for layer in range(1, 48, 2)}
    assignment = assign_experts(128, range(32), 5)
    current = Holdings({slot: dict.fromkeys(loads, held) for slot, held in assignment.items()})
    start = time.process_time()
    after = rebalance(loads, range(32), 5, 1, None, current)
    assert time.process_time() - start < 1
    assert balancedness(loads, after).total < 1.02 < 1.2 < balancedness(loads, current).total


@given(st.data(), st.integers(1, 20), st.integers(1, 8))
def test_any_rebalance_is_valid_and_never_worse(data: st.DataObject, num_experts: int, num_slots: int) -> None:
    replicas = data.draw(st.integers(1, min(3, num_slots)))
    least = -(-num_experts * replicas // num_slots)
    seats = data.draw(st.none() | st.integers(least, num_experts))
    nodes = data.draw(
        st.none() | st.fixed_dictionaries(dict.fromkeys(range(num_slots), st.sampled_from("abc"))), label="nodes"
    )
    loads_E = st.lists(st.floats(0, 1e6), min_size=num_experts, max_size=num_experts)
    loads, before = (data.draw(st.fixed_dictionaries(dict.fromkeys((1, 3), loads_E))) for _ in range(2))
    assignment = assign_experts(num_experts, range(num_slots), None, replicas, nodes)
    first = Holdings({slot: dict.fromkeys((1, 3), held) for slot, held in assignment.items()})
    current = resize(first, range(num_slots), seats, replicas, nodes, before)

    after = rebalance(loads, range(num_slots), seats, replicas, nodes, current)

    assert after.num_experts == num_experts and after.layers == (1, 3)
    check_seats(after, range(num_slots), seats, replicas)
    if replicas > 1:
        assert all(survives(after, {slot}) for slot in range(num_slots))
    if replicas > 1 and nodes is not None:
        check_nodes(after, nodes)
    assert balancedness(loads, after).total <= balancedness(loads, current).total
    assert rebalance(loads, range(num_slots), seats, replicas, nodes, current) == after


def test_holdings_that_break_the_rules_are_replaced_even_if_they_are_even() -> None:
    single = Holdings({0: {0: (0, 1)}, 1: {0: (2, 3)}})
    even = {0: (1, 1, 1, 1)}
    assert rebalance(even, (0, 1), None, 1, None, single) is single
    assert rebalance(even, (0, 1), None, 2, None, single).holders[0] == ((0, 1),) * 4
    assert set(rebalance(even, (0, 1, 2), None, 1, None, single).slots) == {0, 1, 2}
    crowded = Holdings({0: {0: (0, 1, 2)}, 1: {0: (3,)}})
    loads = {0: (1, 1, 1, 3)}
    assert rebalance(loads, (0, 1), None, 1, None, crowded) is crowded
    assert rebalance(loads, (0, 1), 2, 1, None, crowded).held(1, 0) != (3,)
    with pytest.raises(ConfigError, match=r"^experts.actors \(1\) must be at least 2"):
        rebalance(even, (0,), 2, 1, None, single)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_average_forgets_with_its_time_constant() -> None:
    clock = Clock()
    average = LoadAverage([1, 3], 2, window_s=10, clock=clock)
    average.update({"a": {1: (0, 0), 3: (0, 0)}})
    clock.now += 1
    average.update({"a": {1: (50, 0), 3: (0, 10)}})
    assert average.loads() == {1: (5.0, 0.0), 3: (0.0, 1.0)}
    clock.now += 10
    assert average.loads()[1][0] == pytest.approx(5 / math.e)
    average.update({"a": {1: (50, 30), 3: (0, 10)}})
    assert average.loads()[1] == pytest.approx((5 / math.e, 3.0))


def test_a_steady_rate_is_what_it_says_in_the_end() -> None:
    clock = Clock()
    average = LoadAverage([0], 1, window_s=5, clock=clock)
    for second in range(200):
        average.update({"a": {0: (70 * second,)}})
        clock.now += 1
    average.update({"a": {0: (70 * 200,)}})
    assert average.loads()[0][0] == pytest.approx(70, rel=0.11)


def test_sources_add_up_and_the_first_look_only_says_where_they_stand() -> None:
    average = LoadAverage([0], 2, window_s=1, clock=Clock())
    average.update({"a": {0: (1000, 0)}})
    assert average.loads() == {0: (0.0, 0.0)}
    average.update({"a": {0: (1001, 0)}, "b": {0: (0, 500)}})
    average.update({"a": {0: (1003, 0)}, "b": {0: (0, 504)}})
    assert average.loads() == {0: (3.0, 4.0)}


def test_counters_may_begin_anew() -> None:
    average = LoadAverage([0, 1], 2, window_s=1, clock=Clock())
    average.update({"a": {0: (100, 100), 1: (100, 0)}})
    average.update({"a": {0: (2, 300), 1: (200, 0)}})  # expert 0 of layer 0 says it: the others began anew as well
    assert average.loads() == {0: (2.0, 300.0), 1: (200.0, 0.0)}


def test_a_source_that_was_away_is_looked_at_afresh() -> None:
    average = LoadAverage([0], 1, window_s=1, clock=Clock())
    average.update({"a": {0: (10,)}})
    average.update({})
    average.update({"a": {0: (50,)}})
    assert average.loads() == {0: (0.0,)}


def test_layers_that_a_source_counts_only_from_now_on() -> None:
    average = LoadAverage([0, 1], 1, window_s=1, clock=Clock())
    average.update({"a": {0: (10,)}})
    average.update({"a": {0: (11,), 1: (4,)}})
    assert average.loads() == {0: (1.0,), 1: (4.0,)}
