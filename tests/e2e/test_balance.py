"""A router that prefers few experts: their load is spread over the slots by itself, and tokens stay as they are."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from herder.v1 import control_pb2
from tests.e2e.conftest import running
from tests.e2e.harm import Control, undisturbed
from tests.e2e.streams import run_streams
from tests.llama4.reference import save_random

pytestmark = pytest.mark.cluster

TOKENS = 120


def skew(path: Path, favourites: tuple[int, ...]) -> None:
    """Makes every router prefer these experts."""
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(3)
    for name, weight in tensors.items():
        if name.endswith("router.weight"):
            # Rows of one direction and small differences: the logits' order is nearly the same for half of all inputs.
            direction = torch.randn(weight.shape[1], generator=generator)
            weight[:] = 0.02 * torch.randn(weight.shape, generator=generator)
            for expert in favourites:
                weight[expert] += direction * (1 if expert % 2 else -1)
    save_file(tensors, file, metadata={"format": "pt"})


def test_skewed_load_is_evened_out(tmp_path):
    save_random(tmp_path, seed=9, vocab_size=300, num_local_experts=16, num_experts_per_tok=1)
    skew(tmp_path, favourites=(6, 7))  # both on slot 1, and nowhere else
    balance = "balance={mode: auto, interval_s: 3, window_s: 5}"
    settings = (f"model.path={tmp_path}", "attention.actors=1", "experts.actors=4", "experts.per_actor=5", balance)
    with running(*settings) as deployment:
        expected = undisturbed(deployment.grpc_address, range(8), TOKENS)
        control = Control(deployment.grpc_address)
        deadline = time.monotonic() + 60
        highest = 0.0
        while time.monotonic() < deadline:
            streams = asyncio.run(run_streams(deployment.grpc_address, list(expected), TOKENS))
            assert {number: stream.tokens for number, stream in streams.items()} == expected
            found = control.stub.GetExpertPlacement(control_pb2.GetExpertPlacementRequest(), timeout=60)
            highest = max(highest, found.balancedness, found.balancedness_before)
            if found.balancedness_before and found.balancedness < 1.2:
                break
        assert highest > 2.5 and found.balancedness < 1.2, found
        assert found.HasField("seconds_since_move")
