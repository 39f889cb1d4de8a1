"""The transport benchmark measures what it names, on real processes."""

from __future__ import annotations

import pytest
import torch

from bench.dispatch import NUM_EXPERTS, WIDTH, Case, p2p_seconds


def test_a_case_is_the_batch_that_its_title_says() -> None:
    case = Case(attention=2, slots=2, rows=8, rounds=3)
    x_TD, ids_T1 = case.batch(0)
    assert x_TD.shape == (8, WIDTH) and case.bytes_each_way == x_TD.nbytes
    assert ids_T1.shape == (8, 1) and int(ids_T1.max()) < NUM_EXPERTS
    assert not torch.equal(x_TD, case.batch(1)[0])
    assert case.expert_map.slot_ids == (0, 1)


@pytest.mark.cluster
def test_every_round_of_every_rank_is_timed() -> None:
    found = p2p_seconds(Case(attention=2, slots=1, rows=3, rounds=5))
    assert len(found) == 10 and min(found) > 0
