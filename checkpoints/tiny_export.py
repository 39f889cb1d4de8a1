"""Writes the tiny checkpoint the way Meta's Llama 4 checkpoints are laid out on the Hugging Face hub."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    GenerationConfig,
    Llama4Config,
    Llama4ForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from checkpoints.tasks import Example
from checkpoints.tiny_training import Recipe

MAX_SHARD_SIZE = "4MB"


def write_skeleton(out: Path, config: Llama4Config, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write all but the weights, replacing what is in `out`."""
    shutil.rmtree(out, ignore_errors=True)
    config.save_pretrained(out)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    vision = config.vision_config
    side = {"height": vision.image_size, "width": vision.image_size}
    # Llama4ImageProcessor could write this by itself, but does not import without torchvision.
    settings = {
        "image_processor_type": "Llama4ImageProcessor",
        "processor_class": "Llama4Processor",
        "size": side,
        "max_patches": 16,
        "resize_to_max_canvas": False,
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": Image.Resampling.BILINEAR,
    }
    _write_json(out / "preprocessor_config.json", settings)
    processor = {
        "processor_class": "Llama4Processor",
        "patch_size": vision.patch_size,
        "pixel_shuffle_ratio": vision.pixel_shuffle_ratio,
    }
    _write_json(out / "processor_config.json", processor)


def _write_json(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_weights(out: Path, model: Llama4ForConditionalGeneration) -> None:
    """Write sharded bfloat16 weights beside the skeleton."""
    for parameter in model.parameters():  # not model.to(): the vision tower keeps complex buffers
        parameter.data = parameter.data.to(torch.bfloat16)
    text = model.config.text_config
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )
    model.save_pretrained(out, max_shard_size=MAX_SHARD_SIZE)


def load(directory: Path) -> Llama4ForConditionalGeneration:
    """A written checkpoint, computing in float32."""
    return Llama4ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()


def write_questions(out: Path, examples: Sequence[Example]) -> None:
    """Write the evaluation set as `herder eval` reads it: one JSON object a line, pictures as PNG in base64."""
    lines = []
    for example in examples:
        line: dict[str, object] = {"task": example.task, "prompt": example.prompt, "answer": example.answer}
        if example.pictures:
            line["images"] = [base64.b64encode(png(picture)).decode() for picture in example.pictures]
        lines.append(json.dumps(line) + "\n")
    (out / "eval.jsonl").write_text("".join(lines), encoding="utf-8")


def png(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()


@dataclass(frozen=True)
class Trained:
    """A stage of training as the card tells of it. `seconds`: None when its weights come from an earlier run."""

    name: str
    recipe: Recipe
    seconds: float | None

    def row(self) -> str:
        """The card's row."""
        took = "an earlier run" if self.seconds is None else f"{self.seconds / 60:.0f}"
        return f"| {self.name} | {self.recipe.steps} | {self.recipe.batch_size} | {self.recipe.seed} | {took} |"


def write_card(
    out: Path,
    scores: dict[str, float],
    loads: dict[int, list[float]],
    *,
    command: str,
    stages: Sequence[Trained],
    workers: int,
) -> None:
    """Write the model card with the figures measured on the checkpoint as stored."""
    config = Llama4Config.from_pretrained(out)
    text, vision = config.text_config, config.vision_config
    model = load(out)
    text_params = sum(p.numel() for p in model.language_model.parameters())
    vision_params = sum(p.numel() for p in model.parameters()) - text_params
    score_rows = "\n".join(f"| {task} | {score:.1%} |" for task, score in scores.items())
    weak = ", ".join(task for task, score in scores.items() if score < 0.95) or "none"
    load_rows = "\n".join(f"| {layer} | {min(shares):.1%} | {max(shares):.1%} |" for layer, shares in loads.items())
    stage_rows = "\n".join(stage.row() for stage in stages)
    mixtures = ", ".join(map(str, text.moe_layers))
    nope = ", ".join(str(layer) for layer, rope in enumerate(text.no_rope_layers) if not rope)
    tokens = round((vision.image_size // vision.patch_size * vision.pixel_shuffle_ratio) ** 2)
    card = f"""\
# tiny

A Llama 4 in miniature, so that Herder can be run and tested without downloading anything.

- {text_params / 1e6:.2f}M text parameters in bfloat16, {text.num_hidden_layers} layers of width {text.hidden_size}
- layers {mixtures}: {text.num_local_experts} experts, top-1 sigmoid routing and a shared expert; the others: dense
- {text.num_attention_heads} query heads on {text.num_key_value_heads} key-value heads of {text.head_dim}
- attention in chunks of {text.attention_chunk_size} tokens; layer {nope}: full attention, no rotary embeddings
- {vision_params / 1e6:.2f}M vision parameters, {vision.num_hidden_layers} layers of width {vision.hidden_size}:
  tiles of {vision.image_size} pixels, patches of {vision.patch_size}, {tokens} tokens a tile

It answers the questions in `eval.jsonl` and others of the same kinds, and nothing else. The tokenizer is byte-level
with Llama 4's special tokens.

Pictures are of the kinds that `checkpoints/pictures.py` draws, most of one tile, one in five of up to 2 x 2 tiles, a
few of up to 4 x 4:

| task | shows | asked | answered |
|---|---|---|---|
| digit | a digit | `Which digit is this?` | `7` |
| shape | a circle, square, triangle or cross in one of six colours | `What is shown?` | `red circle` |
| dots | one to six dots | `How many dots?` | `3` |
| compare | two pictures of dots | `Which has more dots?` | `first` or `second` |

## Held-out accuracy

Greedy answers to questions never seen in training, computed in float32 from the stored weights with transformers. The
split is by a hash of the question, whatever its wording (of weekdays, which are few, by a hash of the prompt), and for
pictures by a hash of their pixels.

| task | accuracy |
|---|---|
{score_rows}

Below the target of 95%: {weak}.

## Expert load

Share of the held-out prompts' tokens that an expert receives; {1 / text.num_local_experts:.1%} is an even load.

| layer | least loaded | most loaded |
|---|---|---|
{load_rows}

## Training

`{command}`, {workers} worker processes on a machine with two CPU cores that
was busy with other work as well.

| stage | steps | samples a step | seed | minutes |
|---|---|---|---|---|
{stage_rows}
"""
    (out / "README.md").write_text(card, encoding="utf-8")
