"""Trains the bundled tiny Llama 4 checkpoint on a CPU and writes it in the Hugging Face layout.

    python -m checkpoints.train_tiny

The defaults reproduce checkpoints/tiny. The script ends with held-out accuracy by task and the load of every expert,
and fails when a task stays below MIN_ACCURACY or an expert below MIN_LOAD.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers.utils import logging as transformers_logging

from checkpoints.tasks import evaluation_set
from checkpoints.tiny_eval import accuracy, expert_load
from checkpoints.tiny_export import load, write_card, write_checkpoint
from checkpoints.tiny_model import MAX_POSITIONS, build_config
from checkpoints.tiny_tokenizer import build_tokenizer
from checkpoints.tiny_training import Recipe, train

MIN_ACCURACY = 0.95
MIN_LOAD = 0.01
EVAL_PER_TASK = 100


def main(
    out: Annotated[Path, typer.Option(help="Directory to write.")] = Path(__file__).parent / "tiny",
    steps: Annotated[int, typer.Option(min=1, help="Optimisation steps.")] = Recipe.steps,
    batch_size: Annotated[int, typer.Option(min=8, help="Samples per step.")] = Recipe.batch_size,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = Recipe.learning_rate,
    seed: Annotated[int, typer.Option(help="Seed of weights, training stream and evaluation set.")] = Recipe.seed,
    threads: Annotated[int, typer.Option(min=1, help="CPU cores; the weights depend on how many.")] = 2,
    watch_every: Annotated[int, typer.Option(min=1, help="Steps between progress reports.")] = Recipe.watch_every,
    state: Annotated[Path | None, typer.Option(help="File to save training to, and to continue from.")] = None,
) -> None:
    """Train, write and evaluate the tiny Llama 4 checkpoint."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(threads)
    tokenizer = build_tokenizer(MAX_POSITIONS)
    config = build_config(tokenizer)
    held_out = evaluation_set(random.Random(seed), EVAL_PER_TASK)
    recipe = Recipe(steps=steps, batch_size=batch_size, learning_rate=learning_rate, seed=seed, watch_every=watch_every)
    model, seconds = train(config, tokenizer, recipe, workers=threads, state_path=state)
    torch.manual_seed(seed)  # for the untrained vision tower
    write_checkpoint(out, model, config, tokenizer)
    lines = [{"task": ex.task, "prompt": ex.prompt, "answer": ex.answer} for ex in held_out]
    (out / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    # Judged as users get it: bfloat16 weights read back from disk, stock transformers code.
    stored = load(out)
    scores = accuracy(stored, tokenizer, held_out)
    loads = expert_load(stored, tokenizer, held_out)
    minutes = seconds / 60
    command = "python -m checkpoints.train_tiny"
    for name in ("steps", "batch_size", "learning_rate", "seed"):
        if getattr(recipe, name) != getattr(Recipe, name):
            command += f" --{name.replace('_', '-')} {getattr(recipe, name)}"
    write_card(out, scores, loads, command=command, recipe=recipe, workers=threads, minutes=minutes)

    for task, score in scores.items():
        print(f"{task:12} {score:7.1%}")
    for layer, shares in loads.items():
        print(f"layer {layer} load", " ".join(f"{share:.1%}" for share in shares))
    print(f"{minutes:.1f} minutes")
    weak = [task for task, score in scores.items() if score < MIN_ACCURACY]
    dead = [(layer, e) for layer, shares in loads.items() for e, share in enumerate(shares) if share < MIN_LOAD]
    if weak or dead:
        print(f"FAILED: tasks below {MIN_ACCURACY:.0%}: {weak}; experts below {MIN_LOAD:.0%}: {dead}", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
