"""A small random checkpoint, and an engine over it, for the tests that need a real network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.llama4.reference import save_random
from tests.single import SingleProcess


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts in the layers 1 and 3, chunks of 12 positions, a vocabulary of 96."""
    path = tmp_path_factory.mktemp("random")
    save_random(
        path,
        seed=3,
        vocab_size=96,
        num_hidden_layers=4,
        num_local_experts=4,
        attention_chunk_size=12,
        interleave_moe_layer_step=2,
        max_position_embeddings=256,
    )
    return path


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[SingleProcess]:
    running = SingleProcess(checkpoint, page_size=4, pages=128, max_batch_tokens=24)
    yield running
    running.close()
