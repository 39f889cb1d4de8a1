from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama4 import precision, weights
from llama4.config import TextConfig
from llama4.precision import choose_dtype
from llama4.weights import Checkpoint, CheckpointError, load_decoder, load_experts
from tests.llama4.reference import SMALL, reference_logits, save_random
from tests.llama4.runner import Runner


def sharded(path: Path, **overrides: object) -> TextConfig:
    return save_random(path, seed=2, conditional=True, max_shard_size="20KB", **overrides)


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("tie", [False, True])
def test_all_layouts_are_read(conditional: bool, max_shard_size: str, tie: bool, tmp_path: Path) -> None:
    config = save_random(
        tmp_path, seed=1, conditional=conditional, max_shard_size=max_shard_size, tie_word_embeddings=tie
    )
    Checkpoint(tmp_path).validate(config)
    (got,) = Runner(tmp_path, [[1, 2, 3]], page_size=4).run([[(0, 3)]])
    torch.testing.assert_close(got, reference_logits(tmp_path, [1, 2, 3]), atol=1e-4, rtol=0)


def test_bfloat16_is_converted(tmp_path: Path) -> None:
    config = save_random(tmp_path, seed=1, dtype=torch.bfloat16)
    experts = load_experts(Checkpoint(tmp_path), config, {1: [2]}, torch.float32, "cpu")
    stored = load_file(tmp_path / "model.safetensors")["model.layers.1.feed_forward.experts.down_proj"]
    (_, (name, index, down)) = experts.tensors()
    assert (name, index, down.dtype) == ("model.layers.1.feed_forward.experts.down_proj", 2, torch.float32)
    torch.testing.assert_close(down, stored[2].float(), atol=0, rtol=0)


def test_small_blocks_and_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = sharded(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    whole = load_decoder(checkpoint, config, torch.float32, "cpu")
    monkeypatch.setattr(weights, "BLOCK_BYTES", 300)
    calls: list[tuple[int, int]] = []
    blocks = load_decoder(checkpoint, config, torch.float32, "cpu", lambda *c: calls.append(c))
    for (name, a), (_, b) in zip(whole.tensors(), blocks.tensors(), strict=True):
        assert torch.equal(a, b), name
    assert calls == sorted(calls) and len(set(calls)) == len(calls)
    assert calls[-1] == (blocks.nbytes, blocks.nbytes)
    part = load_experts(checkpoint, config, {0: [1], 3: [0, 3]}, torch.float32, "cpu", lambda *c: calls.append(c))
    assert calls[-1] == (part.nbytes, part.nbytes) == (3 * 3 * 32 * 24 * 4,) * 2


def test_broken_checkpoints(tmp_path: Path) -> None:
    good = tmp_path / "good"
    config = sharded(good)
    index = json.loads((good / "model.safetensors.index.json").read_text())
    name = "language_model.model.layers.1.feed_forward.experts.gate_up_proj"
    shard = index["weight_map"][name]

    def broken(case: str) -> Path:
        path = tmp_path / case
        shutil.copytree(good, path)
        return path

    def refused(path: Path, *words: str) -> None:
        with pytest.raises(CheckpointError) as error:
            Checkpoint(path).validate(config)
        message = str(error.value)
        assert all(word in message for word in words) and "\n" not in message, message

    path = broken("missing")
    (path / shard).unlink()
    refused(path, shard, "does not exist")

    path = broken("truncated")
    os.truncate(path / shard, (path / shard).stat().st_size - 10)
    refused(path, shard, "truncated", "language_model.")

    path = broken("header")
    os.truncate(path / shard, 40)
    refused(path, shard, "truncated")

    path = broken("offsets")
    header = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0]}}'
    (path / shard).write_bytes(len(header).to_bytes(8, "little") + header)
    refused(path, shard, "not a safetensors file")

    path = broken("garbage")
    (path / shard).write_bytes(b"\x05\0\0\0\0\0\0\0hello")
    refused(path, shard, "not a safetensors file")

    path = broken("lacks")
    tensors = load_file(path / shard)
    del tensors[name]
    save_file(tensors, path / shard)
    refused(path, shard, name, "does not hold")

    path = broken("unlisted")
    rest = {key: file for key, file in index["weight_map"].items() if key != name}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": rest}))
    refused(path, name, "no tensor")

    path = broken("shape")
    tensors = load_file(path / shard)
    tensors[name] = tensors[name][:, :, :-2].contiguous()
    save_file(tensors, path / shard)
    refused(path, shard, name, "shape [4, 32, 46]", "[4, 32, 48]")

    path = broken("type")
    tensors = load_file(path / shard)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, path / shard)
    refused(path, shard, name, "F8_E4M3")

    path = broken("index")
    (path / "model.safetensors.index.json").write_text("[]")
    refused(path, "model.safetensors.index.json")

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds neither")


def test_a_shard_that_vanishes_later(tmp_path: Path) -> None:
    config = sharded(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    stored = checkpoint.find("model.layers.1.feed_forward.experts.down_proj", (4, 24, 32))
    stored.file.unlink()
    with pytest.raises(CheckpointError, match=rf"{stored.name} cannot be read from .*{stored.file.name}"):
        load_experts(checkpoint, config, {1: [0]}, torch.float32, "cpu")


MEASURE = """
import sys
import torch
from llama4.config import TextConfig
from llama4.weights import Checkpoint, load_experts

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))

path, dtype = sys.argv[1], getattr(torch, sys.argv[2])
torch.set_num_threads(1)
config, checkpoint = TextConfig.from_dir(path), Checkpoint(path)
torch.ones(1, dtype=torch.bfloat16).float()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
experts = load_experts(checkpoint, config, {0: range(4), 1: range(4, 8)}, dtype, "cpu")
print((status("VmHWM") - before) / experts.nbytes, experts.nbytes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_loading_holds_little_more_than_its_own_slice(stored: torch.dtype, tmp_path: Path) -> None:
    """A quarter of the experts of a checkpoint of 200 MB (in float32); bfloat16 is converted while it is read."""
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 16, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, **shape}))
    tensors = {}
    for layer in range(2):
        prefix = f"model.layers.{layer}.feed_forward.experts"
        tensors[f"{prefix}.gate_up_proj"] = torch.full((16, 512, 2048), 0.5, dtype=stored)
        tensors[f"{prefix}.down_proj"] = torch.full((16, 1024, 512), 0.5, dtype=stored)
    save_file(tensors, tmp_path / "model.safetensors")
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), "float32"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    growth, size = output.split()
    assert int(size) == 2 * 4 * 3 * 512 * 1024 * 4
    assert 0.95 <= float(growth) <= 1.15, output


def test_choose_dtype(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: False)
    assert choose_dtype("cpu") == choose_dtype("cpu", "float32") == torch.float32
    assert choose_dtype("cuda") == torch.bfloat16 and choose_dtype("cuda", "float32") == torch.float32
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert choose_dtype("cpu", "bfloat16") == torch.bfloat16
    assert "bfloat16" in caplog.text
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: True)
    caplog.clear()
    assert choose_dtype("cpu") == torch.float32, "the same answers on every CPU"
    assert choose_dtype("cpu", "bfloat16") == torch.bfloat16 and not caplog.text
    with pytest.raises(ValueError, match="dtype must be one of auto, float32, bfloat16, not 'int8'"):
        choose_dtype("cpu", "int8")  # type: ignore[arg-type]
