"""Where compiled kernels are kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llama4 import intrinsics


def test_it_is_beside_the_code() -> None:
    kept = intrinsics._cache_directory()
    assert kept is not None and kept.parent == Path(intrinsics.__file__).parent / "__pycache__"


def test_an_image_whose_code_may_not_be_written_keeps_it_at_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).is_relative_to(tmp_path))
    kept = intrinsics._cache_directory()
    assert kept is not None and kept.parent == tmp_path / ".cache/herder"


def test_where_nothing_may_be_written_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert intrinsics._cache_directory() is None
