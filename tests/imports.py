"""What Python code imports, however deep: in a process of its own, since this one has imported nearly everything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[1]


def loaded_by(code: str, *modules: str) -> set[str]:
    """Those of the modules that are loaded once `code` has run, at the repository's root."""
    script = f"{code}\nimport sys; print(*({set(modules)} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], cwd=_ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines()[-1].split())
