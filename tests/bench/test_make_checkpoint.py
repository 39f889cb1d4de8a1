from __future__ import annotations

from pathlib import Path

import torch
import transformers

from bench.bounds import Costs
from bench.make_checkpoint import CONFIG, make, shapes
from llama4.config import TextConfig
from llama4.weights import Checkpoint
from tests.bench.conftest import MINI


def test_the_bench_checkpoint_has_515_million_parameters() -> None:
    assert sum(torch.Size(shape).numel() for _, shape in shapes(CONFIG)) == 514_475_008


def test_transformers_and_herder_find_every_tensor(mini: Path) -> None:
    _, found = transformers.Llama4ForCausalLM.from_pretrained(mini, dtype=torch.float32, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    Checkpoint(mini).validate(TextConfig.from_dir(mini))
    assert len(list(mini.glob("*.safetensors"))) > 1


def test_the_same_seed_gives_the_same_bytes(mini: Path, tmp_path: Path) -> None:
    make(tmp_path / "same", config=MINI, shard_bytes=40_000)
    make(tmp_path / "other", config=MINI, shard_bytes=40_000, seed=1)
    for file in mini.glob("*.safetensors"):
        assert (tmp_path / "same" / file.name).read_bytes() == file.read_bytes()
        assert (tmp_path / "other" / file.name).read_bytes() != file.read_bytes()


def test_costs_count_every_parameter_once(mini: Path) -> None:
    config = TextConfig.from_dir(mini)
    costs = Costs(config)
    embedding = config.vocab_size * config.hidden_size
    experts = len(config.moe_layers) * config.num_local_experts
    total = sum(torch.Size(shape).numel() for _, shape in shapes(MINI))
    assert costs.weight_bytes(experts) == 4 * (total - embedding)


def test_chunked_layers_cost_their_chunk_only() -> None:
    config = TextConfig.from_dict(CONFIG | {"attention_chunk_size": 100})
    # Layers 3 and 7 attend to everything, the other six to the chunk of 100 that starts at 200.
    assert Costs(config).keys(249) == 2 * 250 + 6 * 50
    assert Costs(config).kv_bytes(249) == (2 * 250 + 6 * 50) * 2 * 4 * 64 * 4
