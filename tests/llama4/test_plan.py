from __future__ import annotations

import torch

from llama4 import gathered_attention, plan
from llama4.config import LayerKind, TextConfig
from llama4.gathered_attention import DecodeGroup, GatheredDecode
from llama4.kv_pages import Batch, Segment
from llama4.paged_attention import PagedDecode
from llama4.plan import StepPlan, plan_step
from llama4.prefill_attention import BLOCK
from llama4.rope import inverse_frequencies
from tests.llama4.reference import SMALL

PAGE = 16


def plan_for(*work: tuple[int, int], stride: int = 1, dtype: torch.dtype = torch.float32) -> StepPlan:
    """The plan for segments of (position, length); page ids count up by `stride`."""
    config = TextConfig.from_dict({**SMALL, "attention_chunk_size": 100, "no_rope_layer_interval": 2})
    segments, start, page = [], 0, 0
    for position, length in work:
        ids = list(range(page, page + stride * -(-(position + length) // PAGE), stride))
        segments.append(Segment(start, length, position, {"full": ids, "chunked": ids}))
        start, page = start + length, page + stride * len(ids)
    batch = Batch.of([0] * start, segments)
    return plan_step(config, batch, PAGE, inverse_frequencies(config, "cpu"), dtype)


def groups_for(kind: LayerKind, *work: tuple[int, int]) -> tuple[DecodeGroup, ...]:
    """The decode groups of a dtype whose pages are gathered."""
    decode = plan_for(*work, stride=2, dtype=torch.bfloat16).kinds[kind].decode
    assert isinstance(decode, GatheredDecode)
    return decode.groups


def test_one_long_sequence_does_not_make_the_short_ones_pay() -> None:
    groups = groups_for("full", *[(20 + i, 1) for i in range(31)], (20000, 1))
    gathered = sum(len(group.pages_N) for group in groups)
    assert gathered <= 31 * gathered_attention.SMALL_GROUP_PAGES + 20000 // PAGE + 1
    assert sorted(row for group in groups for row in group.rows_B.tolist()) == list(range(32))


def test_groups_waste_at_most_half() -> None:
    work = [(300 * i, 1) for i in range(1, 30)]
    for group in groups_for("full", *work):
        width = len(group.pages_N) // len(group.rows_B)
        for row in group.rows_B.tolist():
            assert width <= max(gathered_attention.SMALL_GROUP_PAGES, 2 * -(-(work[row][0] + 1) // PAGE))


def test_chunked_layers_gather_the_current_chunk_only() -> None:
    work = (1040, 1), (1040, 30), (1060, 1)
    # The chunk starts at 1000, in a sequence's page 62; 1040 is in page 65 and 1060 in page 66.
    (group,) = groups_for("chunked", *work)
    assert group.mask_B11L is not None
    assert group.pages_N.tolist() == [124, 126, 128, 130, 124] + [2 * (66 + 67 + page) for page in range(62, 67)]
    assert group.keys == slice(1000 - 992, 1060 - 992 + 1)
    assert [(mask_L == 0).sum().item() for mask_L in group.mask_B11L[:, 0, 0]] == [41, 61]
    assert group.rows_B.tolist() == [0, 31]
    (run,) = plan_for(*work, stride=2, dtype=torch.bfloat16).kinds["chunked"].prefill
    assert (run.history, run.offset, run.pages_P.tolist()) == (40, 8, [2 * (66 + page) for page in (62, 63, 64)])


def test_windows_that_are_equal_need_no_mask() -> None:
    (group,) = groups_for("chunked", (1040, 1))
    assert group.keys == slice(8, 49) and group.mask_B11L is None


def test_blocks_cover_each_window_once() -> None:
    assert plan.FEW_PAIRS < 1000 * 1700
    decode = plan_for((1040, 1), (700, 1000), (1060, 1)).kinds["full"].decode
    assert isinstance(decode, PagedDecode)
    covered: dict[int, list[int]] = {}
    for row, page_at, first, keys, blocks, first_task in decode.tasks_N6.tolist():
        assert keys <= BLOCK and blocks == 9 and first_task == (0 if row == 0 else 9)
        pages = decode.pages_P[page_at:].tolist()
        covered.setdefault(row, []).extend(pages[i // PAGE] * PAGE + i % PAGE for i in range(first, first + keys))
    first_page = -(-1041 // PAGE) + -(-1700 // PAGE)  # of the third segment; ids count up
    assert covered == {0: list(range(1041)), 1001: list(range(first_page * PAGE, first_page * PAGE + 1061))}


def test_the_rows_of_a_short_run_attend_by_themselves() -> None:
    steps = plan_for((250, 7), (20, 1)).kinds["chunked"]
    assert isinstance(steps.decode, PagedDecode) and not steps.prefill and steps.written_rows is None
    assert [(row, keys) for row, _, _, keys, *_ in steps.decode.tasks_N6.tolist()] == [
        *((row, 51 + row) for row in range(7)),
        (7, 21),
    ]


def test_runs_are_cut_at_chunk_borders_and_only_the_last_chunk_is_kept() -> None:
    steps = plan_for((250, 200)).kinds["chunked"]
    assert [(run.start, run.stop, run.history) for run in steps.prefill] == [(0, 50, 50), (50, 150, 0), (150, 200, 0)]
    assert steps.written_rows is not None and steps.written_rows.tolist() == list(range(150, 200))
    assert steps.slots.tolist() == list(range(400, 450))


def test_the_mask_of_a_long_prefill_stays_small() -> None:
    step = plan_for((100_000, 512), dtype=torch.bfloat16)
    assert step.mask_QL.numel() <= plan.MASK_ELEMENTS
    mask = step.prefill_mask(2, 9)
    assert (mask == 0).tolist() == [[True] * 8 + [False], [True] * 9]
    assert plan_for((0, 512), dtype=torch.bfloat16).mask_QL.numel() == 0  # a whole prefill needs none
    assert plan_for((100_000, 512)).mask_QL.numel() == 0  # nor do the compiled functions
