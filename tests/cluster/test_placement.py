"""Which slot holds which expert, and what Ray is asked to reserve."""

from __future__ import annotations

import doctest
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cluster.placement
from cluster.config import ConfigError, DeploymentConfig
from cluster.placement import RoleBundles, assign_experts, bundles, plan_experts


def config(**sections: object) -> DeploymentConfig:
    return DeploymentConfig.model_validate({"model": {"path": "tiny"}, **sections})


def test_the_worked_examples() -> None:
    result = doctest.testmod(cluster.placement)
    assert result.attempted >= 4 and result.failed == 0


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


def test_too_few_seats() -> None:
    with pytest.raises(ConfigError, match=r"^experts.actors \(2\) must be at least 4: .* 8 of 16 experts"):
        assign_experts(16, range(2), 4)


def test_the_plan_has_every_moe_layer_and_epoch_zero() -> None:
    plan = plan_experts(config(experts={"actors": 3, "per_actor": 2}), 4, [1, 3])
    assert plan.epoch == 0
    assert plan.layers == (1, 3)
    assert plan.holders(1, 0) == (0, 2)
    assert plan.holders(3, 3) == (1,)
    assert plan.experts_of(2) == {1: (0, 1), 3: (0, 1)}


def test_bundles_say_what_each_actor_reserves() -> None:
    deployment = config(
        attention={"actors": 2, "num_cpus": 4, "num_gpus": 1, "strategy": "STRICT_SPREAD"},
        experts={"actors": 1, "num_cpus": 0, "num_gpus": 1, "resources": {"fast": 0.5}},
    )
    assert bundles(deployment) == {
        "attention": RoleBundles(({"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0, "GPU": 1.0}), "STRICT_SPREAD"),
        "experts": RoleBundles(({"GPU": 1.0, "fast": 0.5},), "PACK"),
    }
