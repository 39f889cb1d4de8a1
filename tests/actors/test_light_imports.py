"""What starts fast does so because it imports no torch: four seconds of CPU in every process."""

from __future__ import annotations

import pytest

from tests.imports import loaded_by


@pytest.mark.parametrize("module", ["actors.controller", "actors.gateway", "actors.deployment", "actors.serve_app"])
def test_neither_torch_nor_numba_nor_transformers_is_loaded(module: str) -> None:
    assert not loaded_by(f"import {module}", "torch", "numba", "transformers")


def test_a_checkpoint_is_checked_without_the_compiler_of_torch() -> None:
    check = "from pathlib import Path; from cli.preflight import preflight; preflight(Path('configs/tiny_cpu.yaml'))"
    assert not loaded_by(check, "torch._dynamo")
