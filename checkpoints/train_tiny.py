"""Trains the bundled tiny Llama 4 checkpoint on a CPU and writes it in the Hugging Face layout.

    python -m checkpoints.train_tiny

First the text model, then the vision tower on its own, then both together; the defaults are checkpoints/tiny's recipe.
The script ends with held-out accuracy by task and the load of every expert, and fails when a task stays below
MIN_ACCURACY or an expert below MIN_LOAD.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import Llama4ForConditionalGeneration, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from checkpoints.pictures import PICTURE_TASKS
from checkpoints.tasks import TASKS, evaluation_set
from checkpoints.tiny_eval import accuracy, expert_load
from checkpoints.tiny_export import Trained, load, write_card, write_questions, write_skeleton, write_weights
from checkpoints.tiny_model import MAX_POSITIONS, build_config
from checkpoints.tiny_sight import SIGHT_RECIPE, SightStage
from checkpoints.tiny_stages import PICTURE_RECIPE, TEXT_RECIPE, PictureStage, TextStage
from checkpoints.tiny_tokenizer import build_tokenizer
from checkpoints.tiny_training import Model, Stage, train
from engine.image_spec import ImageSpec

MIN_ACCURACY = 0.95
MIN_LOAD = 0.01
EVAL_PER_TASK = 100


def main(
    out: Annotated[Path, typer.Option(help="Directory to write.")] = Path(__file__).parent / "tiny",
    text_from: Annotated[
        Path | None, typer.Option(help="Checkpoint of this shape whose text model is taken instead of training one.")
    ] = None,
    text_steps: Annotated[int, typer.Option(min=1, help="Steps of the text model.")] = TEXT_RECIPE.steps,
    sight_steps: Annotated[int, typer.Option(min=1, help="Steps of the vision tower alone.")] = SIGHT_RECIPE.steps,
    picture_steps: Annotated[int, typer.Option(min=1, help="Steps of both together.")] = PICTURE_RECIPE.steps,
    seed: Annotated[int, typer.Option(help="Seed of weights, training stream and evaluation set.")] = TEXT_RECIPE.seed,
    threads: Annotated[int, typer.Option(min=1, help="CPU cores; the weights depend on how many.")] = 2,
    state: Annotated[Path | None, typer.Option(help="Directory to save training to, and to continue from.")] = None,
) -> None:
    """Train, write and evaluate the tiny Llama 4 checkpoint."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(threads)
    tokenizer = build_tokenizer(MAX_POSITIONS)
    config = build_config(tokenizer)
    with tempfile.TemporaryDirectory() as name:
        write_skeleton(Path(name), config, tokenizer)
        spec = ImageSpec.from_dir(name)
    assert spec is not None, "the tiny model has a vision tower"
    recipes = {
        "text": replace(TEXT_RECIPE, steps=text_steps, seed=seed),
        "sight": replace(SIGHT_RECIPE, steps=sight_steps, seed=seed),
        "pictures": replace(PICTURE_RECIPE, steps=picture_steps, seed=seed),
    }
    seconds: dict[str, float] = {}

    def trained(name: str, stage: Stage[Model]) -> Model:
        model, seconds[name] = train(stage, threads, state and state / f"{name}.pt")
        return model

    if state is not None:
        state.mkdir(parents=True, exist_ok=True)
    if text_from is not None:
        text = load(text_from).language_model
    else:
        text = trained("text", TextStage(config, tokenizer, spec, recipes["text"]))
    sight = trained("sight", SightStage(config, spec, recipes["sight"]))
    weights = {f"language_model.{name}": part for name, part in text.state_dict().items()}
    weights |= sight.speaking_weights(text.get_input_embeddings().weight.detach())
    model = trained("pictures", PictureStage(config, tokenizer, spec, recipes["pictures"], weights))

    command = "python -m checkpoints.train_tiny" + (" --text-from DIRECTORY" if text_from else "")
    stages = [Trained(name, recipe, seconds.get(name)) for name, recipe in recipes.items()]
    report(*write(out, model, tokenizer, command=command, stages=stages, workers=threads))


def write(
    out: Path,
    model: Llama4ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    *,
    command: str,
    stages: Sequence[Trained],
    workers: int,
) -> tuple[dict[str, float], dict[int, list[float]]]:
    """Write the checkpoint with its questions and card; return the accuracy by task and the experts' loads by layer."""
    held_out = evaluation_set(random.Random(stages[0].recipe.seed), EVAL_PER_TASK, TASKS | PICTURE_TASKS)
    write_skeleton(out, model.config, tokenizer)
    write_weights(out, model)
    write_questions(out, held_out)
    spec = ImageSpec.from_dir(out)
    assert spec is not None, "the tiny model has a vision tower"

    # Judged as users get it: bfloat16 weights read back from disk, stock transformers code.
    stored = load(out)
    scores = accuracy(stored, tokenizer, spec, held_out)
    loads = expert_load(stored, tokenizer, spec, held_out)
    write_card(out, scores, loads, command=command, stages=stages, workers=workers)
    return scores, loads


def report(scores: dict[str, float], loads: dict[int, list[float]]) -> None:
    """Print the figures; exit with 1 if one of them is too low."""
    for task, score in scores.items():
        print(f"{task:12} {score:7.1%}")
    for layer, shares in loads.items():
        print(f"layer {layer} load", " ".join(f"{share:.1%}" for share in shares))
    weak = [task for task, score in scores.items() if score < MIN_ACCURACY]
    dead = [(layer, e) for layer, shares in loads.items() for e, share in enumerate(shares) if share < MIN_LOAD]
    if weak or dead:
        print(f"FAILED: tasks below {MIN_ACCURACY:.0%}: {weak}; experts below {MIN_LOAD:.0%}: {dead}", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
