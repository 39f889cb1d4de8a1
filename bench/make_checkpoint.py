"""Makes the bench checkpoint: Llama 4's text model with 515M random parameters, in Hugging Face's layout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from safetensors.torch import save_file
from torch import Tensor

from bench.common import DEFAULT_CHECKPOINT

SHARD_BYTES = 512 << 20
CONFIG: dict[str, object] = {
    "architectures": ["Llama4ForCausalLM"],
    "model_type": "llama4_text",
    "dtype": "float32",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "intermediate_size_mlp": 2048,
    "num_hidden_layers": 8,
    "interleave_moe_layer_step": 1,
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "use_qk_norm": True,
    "attention_bias": False,
    "attention_chunk_size": 8192,
    "no_rope_layer_interval": 4,
    "rope_theta": 500000.0,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 65536,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def shapes(config: dict[str, object]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the checkpoint, in the order of the files."""
    size = {name: value for name, value in config.items() if isinstance(value, int)}
    vocabulary, hidden, width = size["vocab_size"], size["hidden_size"], size["intermediate_size"]
    query_rows = size["num_attention_heads"] * size["head_dim"]
    kv_rows = size["num_key_value_heads"] * size["head_dim"]
    experts = size["num_local_experts"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(size["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.self_attn.q_proj.weight", (query_rows, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (kv_rows, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (kv_rows, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, query_rows)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.feed_forward.router.weight", (experts, hidden)
        yield f"{prefix}.feed_forward.shared_expert.gate_proj.weight", (width, hidden)
        yield f"{prefix}.feed_forward.shared_expert.up_proj.weight", (width, hidden)
        yield f"{prefix}.feed_forward.shared_expert.down_proj.weight", (hidden, width)
        yield f"{prefix}.feed_forward.experts.gate_up_proj", (experts, hidden, 2 * width)
        yield f"{prefix}.feed_forward.experts.down_proj", (experts, width, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Scales that keep activations near 1, so that routing is spread and differs from token to token."""
    noise = torch.randn(shape, generator=generator)
    if "norm" in name:
        return noise.mul_(0.1).add_(1.0)
    if "embed_tokens" in name:
        return noise
    fan_in = shape[-2] if ".experts." in name else shape[-1]
    return noise.div_(fan_in**0.5)


def shards(config: dict[str, object], shard_bytes: int) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """The tensors in files of at most `shard_bytes` (or of one tensor)."""
    shard: list[tuple[str, tuple[int, ...]]] = []
    size = 0
    for name, shape in shapes(config):
        nbytes = 4 * prod(shape)
        if shard and size + nbytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append((name, shape))
        size += nbytes
    yield shard


def make(out: Path, seed: int = 0, config: dict[str, object] | None = None, shard_bytes: int = SHARD_BYTES) -> int:
    """Writes the checkpoint to `out` and returns its number of parameters. The same seed gives the same bytes."""
    config = CONFIG if config is None else config
    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    plan = list(shards(config, shard_bytes))
    total = sum(4 * prod(shape) for shard in plan for _, shape in shard)
    weight_map: dict[str, str] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(f"writing {out}", total=total)
        for number, shard in enumerate(plan, start=1):
            file = f"model-{number:05d}-of-{len(plan):05d}.safetensors"
            tensors = {}
            for name, shape in shard:
                tensors[name] = random_tensor(name, shape, generator)
                progress.advance(task, tensors[name].nbytes)
            save_file(tensors, out / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return total // 4


def main(
    out: Annotated[Path, typer.Option(help="Directory to write to (about 2.1 GB).")] = DEFAULT_CHECKPOINT,
    seed: Annotated[int, typer.Option(help="The same seed gives the same weights.")] = 0,
) -> None:
    """Make the checkpoint that the other benchmarks run on: 8 MoE layers of 16 experts, 515M parameters, random."""
    parameters = make(out, seed)
    typer.echo(f"{out}: {parameters:,} parameters, {parameters * 4 / 1e9:.2f} GB")


if __name__ == "__main__":
    typer.run(main)
