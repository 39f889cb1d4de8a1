from __future__ import annotations

import torch

from llama4 import plan
from llama4.config import TextConfig
from llama4.kv_pages import Batch, Segment
from llama4.plan import DecodeGroup, StepPlan, plan_step
from llama4.rope import inverse_frequencies
from tests.llama4.reference import SMALL

PAGE = 16


def plan_for(*work: tuple[int, int], stride: int = 1) -> StepPlan:
    """The plan for segments of (position, length); page ids count up by `stride`."""
    config = TextConfig.from_dict({**SMALL, "attention_chunk_size": 100, "no_rope_layer_interval": 2})
    segments, start, page = [], 0, 0
    for position, length in work:
        ids = list(range(page, page + stride * -(-(position + length) // PAGE), stride))
        segments.append(Segment(start, length, position, {"full": ids, "chunked": ids}))
        start, page = start + length, page + stride * len(ids)
    batch = Batch.of([0] * start, segments)
    return plan_step(config, batch, PAGE, inverse_frequencies(config, "cpu"), torch.float32)


def rows_of(group: DecodeGroup) -> list[int]:
    return list(range(group.rows)) if group.rows_B is None else group.rows_B.tolist()


def test_one_long_sequence_does_not_make_the_short_ones_pay() -> None:
    steps = plan_for(*[(20 + i, 1) for i in range(31)], (20000, 1), stride=2).kinds["full"]
    gathered = sum(len(group.pages_N) for group in steps.decode)
    assert gathered <= 31 * plan.SMALL_GROUP_PAGES + 20000 // PAGE + 1
    assert sorted(row for group in steps.decode for row in rows_of(group)) == list(range(32))


def test_groups_waste_at_most_half() -> None:
    work = [(300 * i, 1) for i in range(1, 30)]
    for group in plan_for(*work, stride=2).kinds["full"].decode:
        width = len(group.pages_N) // group.rows
        for row in rows_of(group):
            assert width <= max(plan.SMALL_GROUP_PAGES, 2 * -(-(work[row][0] + 1) // PAGE))


def test_chunked_layers_gather_the_current_chunk_only() -> None:
    steps = plan_for((1040, 1), (1040, 30), (1060, 1), stride=2).kinds["chunked"]
    # The chunk starts at 1000, in a sequence's page 62; 1040 is in page 65 and 1060 in page 66.
    (group,) = steps.decode
    assert group.mask_B11L is not None
    assert group.pages_N.tolist() == [124, 126, 128, 130, 124] + [2 * (66 + 67 + page) for page in range(62, 67)]
    assert group.keys == slice(1000 - 992, 1060 - 992 + 1)
    assert [(mask_L == 0).sum().item() for mask_L in group.mask_B11L[:, 0, 0]] == [41, 61]
    assert rows_of(group) == [0, 31]
    (run,) = steps.prefill
    assert (run.history, run.offset, run.pages_P.tolist()) == (40, 8, [2 * (66 + page) for page in (62, 63, 64)])


def test_what_all_rows_share_needs_no_mask_and_no_index() -> None:
    (group,) = plan_for((1040, 1)).kinds["chunked"].decode
    assert group.keys == slice(8, 49) and group.rows_B is None and group.mask_B11L is None
    (group,) = plan_for((40, 1), (44, 1)).kinds["full"].decode
    assert group.rows_B is None and group.mask_B11L is not None


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
