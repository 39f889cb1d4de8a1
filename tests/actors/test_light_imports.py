"""What starts fast does so because it imports no torch: four seconds of CPU in every process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("module", ["actors.controller", "actors.gateway", "actors.deployment", "actors.serve_app"])
def test_neither_torch_nor_numba_nor_transformers_is_loaded(module: str) -> None:
    code = f"import sys, {module}; sys.exit(', '.join({{'torch', 'numba', 'transformers'}} & set(sys.modules)) or 0)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_a_checkpoint_is_checked_without_the_compiler_of_torch() -> None:
    code = (
        "import sys; from pathlib import Path; from cli.preflight import preflight; "
        "preflight(Path('configs/tiny_cpu.yaml')); sys.exit('torch._dynamo' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
