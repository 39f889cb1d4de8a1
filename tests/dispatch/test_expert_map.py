import pickle

import pytest

from dispatch.expert_map import ExpertMap

TWO_LAYERS = {3: ((0,), (4, 0)), 1: ((4,), (0,))}


def test_lookups():
    expert_map = ExpertMap(2, TWO_LAYERS)
    assert expert_map.layers == (1, 3)
    assert expert_map.num_experts == 2
    assert expert_map.slot_ids == (0, 4)
    assert expert_map.holders(3, 1) == (4, 0)
    assert expert_map.experts_of(0) == {1: (1,), 3: (0, 1)}
    assert expert_map.experts_of(4) == {1: (0,), 3: (1,)}
    assert expert_map.experts_of(1) == {}


def test_is_immutable_and_keeps_its_own_copy():
    slots = {0: ((0,),)}
    expert_map = ExpertMap(0, slots)
    slots[1] = ((0,),)
    assert expert_map.layers == (0,)
    with pytest.raises(TypeError):
        expert_map.slots[1] = ((0,),)


def test_travels_and_compares():
    expert_map = ExpertMap(2, TWO_LAYERS)
    assert pickle.loads(pickle.dumps(expert_map)) == expert_map
    assert ExpertMap(3, TWO_LAYERS) != expert_map


@pytest.mark.parametrize(
    ("epoch", "slots", "words"),
    [
        (-1, TWO_LAYERS, "epoch must not be negative"),
        (0, {}, "at least one layer"),
        (0, {0: ()}, "has 0 experts"),
        (0, {0: ((0,),), 1: ((0,), (0,))}, r"slots\[1\] has 2 experts"),
        (0, {0: ((0,), ())}, r"slots\[0\]\[1\]: no slot"),
        (0, {0: ((1, 1),)}, r"slots\[0\]\[0\] must be different"),
        (0, {0: ((-1,),)}, r"slots\[0\]\[0\] must be different"),
    ],
)
def test_rejects(epoch, slots, words):
    with pytest.raises(ValueError, match=words):
        ExpertMap(epoch, slots)
