from __future__ import annotations

from pathlib import Path

import pytest

from bench.make_checkpoint import CONFIG, make

MINI: dict[str, object] = CONFIG | {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
}


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bench checkpoint in small."""
    path = tmp_path_factory.mktemp("mini")
    make(path, config=MINI, shard_bytes=40_000)
    return path
