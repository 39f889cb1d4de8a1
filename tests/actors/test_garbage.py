"""What a process has when it is up is not looked through again."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest

from actors.garbage import keep_all_there_is
from actors.giving_way import import_giving_way


def test_what_exists_is_not_collected_any_more() -> None:
    before = gc.get_freeze_count()
    kept: list[list[int]] = [[] for _ in range(1000)]
    try:
        keep_all_there_is()
        assert gc.get_freeze_count() >= before + len(kept)
    finally:
        gc.unfreeze()


def test_imports_are_not_interrupted_by_collections_nor_looked_through_by_later_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "many_objects.py").write_text("kept = [[] for _ in range(100_000)]")
    monkeypatch.syspath_prepend(tmp_path)
    phases: list[str] = []
    before = gc.get_freeze_count()
    gc.callbacks.append(lambda phase, _: phases.append(phase))
    try:
        import_giving_way("many_objects")
        interrupted, kept = len(phases), gc.get_freeze_count() - before
        exec((tmp_path / "many_objects.py").read_text(), {})
        assert not interrupted and phases and gc.isenabled()
        assert kept >= 100_000
    finally:
        gc.callbacks.pop()
        gc.unfreeze()
        sys.modules.pop("many_objects", None)
