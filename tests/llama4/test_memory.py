from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest
import torch

from llama4.memory import HUGE_PAGE_BYTES, zeros

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ROLLUP = Path("/proc/self/smaps_rollup")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (0, 7), (1025, 1024)])
def test_zeros_that_can_be_written(shape: tuple[int, int], dtype: torch.dtype) -> None:
    found = zeros(shape, dtype, "cpu")
    assert found.shape == shape and found.dtype == dtype and found.is_contiguous() and not found.any()
    rows = found[-1:]
    del found
    gc.collect()
    rows.fill_(3)
    assert (rows == 3).all()  # the memory lives as long as any view of it


def test_the_meta_device_takes_no_memory() -> None:
    assert zeros((1 << 20, 1 << 20), torch.float32, "meta").is_meta


def huge_bytes() -> int:
    found = re.search(r"AnonHugePages:\s+(\d+) kB", ROLLUP.read_text())
    assert found is not None
    return int(found[1]) << 10


@pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text() or not ROLLUP.exists(),
    reason="the system gives no huge pages",
)
def test_large_tensors_lie_on_huge_pages_and_give_them_back() -> None:
    before = huge_bytes()
    large = zeros((8, HUGE_PAGE_BYTES // 4), torch.float32, "cpu")
    assert huge_bytes() == before  # nothing is taken before it is written
    large.fill_(1)
    assert huge_bytes() >= before + 4 * HUGE_PAGE_BYTES  # the system may be short of some
    del large
    gc.collect()
    assert huge_bytes() <= before
