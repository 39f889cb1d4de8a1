"""Writes the tiny checkpoint the way Meta's Llama 4 checkpoints are laid out on the Hugging Face hub."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from checkpoints.tiny_training import Recipe

MAX_SHARD_SIZE = "4MB"


def write_checkpoint(
    out: Path, text_model: Llama4ForCausalLM, config: Llama4Config, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Write sharded bfloat16 weights, configuration and tokenizer, replacing what is in `out`.

    The trained text model becomes the language model of a Llama4ForConditionalGeneration, whose vision tower keeps its
    random initial weights.
    """
    shutil.rmtree(out, ignore_errors=True)
    model = Llama4ForConditionalGeneration(config)
    model.language_model.load_state_dict(text_model.state_dict())
    for parameter in model.parameters():  # not model.to(): the vision tower keeps complex buffers
        parameter.data = parameter.data.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=config.text_config.bos_token_id,
        eos_token_id=config.text_config.eos_token_id,
        pad_token_id=config.text_config.pad_token_id,
    )
    model.save_pretrained(out, max_shard_size=MAX_SHARD_SIZE)
    tokenizer.save_pretrained(out, save_jinja_files=False)


def load(directory: Path) -> Llama4ForCausalLM:
    """The text model of a written checkpoint, computing in float32."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def write_card(
    out: Path,
    scores: dict[str, float],
    loads: dict[int, list[float]],
    *,
    command: str,
    recipe: Recipe,
    workers: int,
    minutes: float,
) -> None:
    """Write the model card with the figures measured on the checkpoint as stored."""
    config = Llama4Config.from_pretrained(out).text_config
    params = sum(p.numel() for p in load(out).parameters())
    score_rows = "\n".join(f"| {task} | {score:.1%} |" for task, score in scores.items())
    weak = ", ".join(task for task, score in scores.items() if score < 0.95) or "none"
    load_rows = "\n".join(f"| {layer} | {min(shares):.1%} | {max(shares):.1%} |" for layer, shares in loads.items())
    mixtures = ", ".join(map(str, config.moe_layers))
    nope = ", ".join(str(layer) for layer, rope in enumerate(config.no_rope_layers) if not rope)
    card = f"""\
# tiny

A Llama 4 in miniature, so that Herder can be run and tested without downloading anything.

- {params / 1e6:.2f}M text parameters in bfloat16, {config.num_hidden_layers} layers of width {config.hidden_size}
- layers {mixtures}: {config.num_local_experts} experts, top-1 sigmoid routing and a shared expert; the others: dense
- {config.num_attention_heads} query heads on {config.num_key_value_heads} key-value heads of {config.head_dim}
- attention in chunks of {config.attention_chunk_size} tokens; layer {nope}: full attention, no rotary embeddings
- a vision tower with random initial weights: only the text model is trained

It answers the questions in `eval.jsonl` and others of the same kinds, and nothing else. The tokenizer is byte-level
with Llama 4's special tokens.

## Held-out accuracy

Greedy answers to questions never seen in training, computed in float32 from the stored weights with transformers. The
split is by a hash of the question, whatever its wording; of weekdays, which are few, by a hash of the prompt.

| task | accuracy |
|---|---|
{score_rows}

Below the target of 95%: {weak}.

## Expert load

Share of the held-out prompts' tokens that an expert receives; {1 / config.num_local_experts:.1%} is an even load.

| layer | least loaded | most loaded |
|---|---|---|
{load_rows}

## Training

`{command}`: {recipe.steps} steps of {recipe.batch_size} samples, seed {recipe.seed}, {workers} worker processes,
{minutes:.0f} minutes on a machine with two CPU cores that was busy with other work as well.
"""
    (out / "README.md").write_text(card, encoding="utf-8")
