from __future__ import annotations

import torch

from llama4 import plan
from llama4.config import TextConfig
from llama4.kv_pages import Batch, Segment
from llama4.plan import StepPlan, plan_step
from llama4.rope import inverse_frequencies
from tests.llama4.reference import SMALL

PAGE = 16


def plan_for(*work: tuple[int, int]) -> StepPlan:
    """The plan for segments of (position, length); page ids count up."""
    config = TextConfig.from_dict({**SMALL, "attention_chunk_size": 100, "no_rope_layer_interval": 2})
    segments, start, page = [], 0, 0
    for position, length in work:
        ids = list(range(page, page + -(-(position + length) // PAGE)))
        segments.append(Segment(start, length, position, {"full": ids, "chunked": ids}))
        start, page = start + length, page + len(ids)
    batch = Batch.of([0] * start, segments)
    return plan_step(config, batch, PAGE, inverse_frequencies(config, "cpu"), torch.float32)


def test_one_long_sequence_does_not_make_the_short_ones_pay() -> None:
    steps = plan_for(*[(20 + i, 1) for i in range(31)], (20000, 1)).kinds["full"]
    gathered = sum(group.pages_N.shape[0] for group in steps.decode)
    assert gathered <= 31 * plan.SMALL_GROUP_PAGES + 20000 // PAGE + 1
    assert sorted(row for group in steps.decode for row in group.rows_B.tolist()) == list(range(32))


def test_groups_waste_at_most_half() -> None:
    work = [(300 * i, 1) for i in range(1, 30)]
    for group in plan_for(*work).kinds["full"].decode:
        width = group.pages_N.shape[0] // group.rows_B.shape[0]
        for row in group.rows_B.tolist():
            assert width <= max(plan.SMALL_GROUP_PAGES, 2 * -(-(work[row][0] + 1) // PAGE))


def test_chunked_layers_gather_the_current_chunk_only() -> None:
    steps = plan_for((1040, 1), (1040, 30)).kinds["chunked"]
    # The chunk starts at 1000, in page 62; 1040 is in page 65. The second request's pages start at 66.
    assert steps.decode[0].pages_N.tolist() == [62, 63, 64, 65]
    mask_L = steps.decode[0].mask_B11L[0, 0, 0]
    assert (mask_L == 0).nonzero().flatten().tolist() == list(range(1000 - 992, 1040 - 992 + 1))
    (run,) = steps.prefill
    assert (run.history, run.offset, run.pages_P.tolist()) == (40, 8, [66 + 62, 66 + 63, 66 + 64])


def test_runs_are_cut_at_chunk_borders_and_only_the_last_chunk_is_kept() -> None:
    steps = plan_for((250, 200)).kinds["chunked"]
    assert [(run.start, run.stop, run.history) for run in steps.prefill] == [(0, 50, 50), (50, 150, 0), (150, 200, 0)]
    assert steps.written_rows is not None and steps.written_rows.tolist() == list(range(150, 200))
    assert steps.slots.tolist() == list(range(400, 450))


def test_the_mask_of_a_long_prefill_stays_small() -> None:
    step = plan_for((100_000, 512))
    assert step.mask_QL.numel() <= plan.MASK_ELEMENTS
    mask = step.prefill_mask(2, 9)
    assert (mask == 0).tolist() == [[True] * 8 + [False], [True] * 9]
    assert plan_for((0, 512)).mask_QL.numel() == 0  # a whole prefill needs none
