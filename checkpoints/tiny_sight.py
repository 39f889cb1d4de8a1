"""The stage in which the vision tower learns to see, before it meets the text model.

It names what a picture shows by one linear layer that is thrown away afterwards: a picture costs a fifth of what it
does with the text model behind it, and far fewer are needed. The layer sees the mean of the tile's tokens, which is
what a text model's attention can read at once.

Tensor suffixes: N pictures, C = 3 colours, H and W a tile's sides, M tokens of a tile, D text model width, K classes.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Llama4Config, Llama4ForConditionalGeneration

from checkpoints.pictures import COLOURS, MAX_DOTS, ONE_TILE_TASKS, SHAPES
from checkpoints.tasks import Example, evaluation_set, training_examples
from checkpoints.tiny_training import Recipe
from engine.image_spec import ImageSpec
from engine.tiles import to_tiles

SIGHT_RECIPE = Recipe(steps=3500, batch_size=64, learning_rate=2e-3, seed=4, watch_every=250)
WATCHED_PER_TASK = 100
TASK_WEIGHTS = {"digit": 1.2, "shape": 0.6, "dots": 1.2}
CLASSES = (
    *(("digit", str(digit)) for digit in range(10)),
    *(("shape", f"{colour} {shape}") for colour in COLOURS for shape in SHAPES),
    *(("dots", str(count)) for count in range(1, MAX_DOTS + 1)),
)
FILTER_SCALE = 3.0
LOUDNESS = 0.01  # makes a tile's tokens about as large as letters


class Sight(nn.Module):
    """The vision tower and its projector, from random weights, with a linear layer that names what a tile shows."""

    def __init__(self, config: Llama4Config) -> None:
        super().__init__()
        whole = Llama4ForConditionalGeneration(config)
        self.vision_model = whole.vision_model
        self.multi_modal_projector = whole.multi_modal_projector
        self.head = nn.Linear(config.text_config.hidden_size, len(CLASSES))
        # The filters begin blind to a patch's brightness, which would drown the outlines within it.
        filters = self.vision_model.patch_embedding.linear.weight.data
        filters -= filters.mean(dim=1, keepdim=True)
        filters *= FILTER_SCALE

    def forward(self, tiles_NCHW: torch.Tensor) -> torch.Tensor:
        """The classes' logits, [N, K]."""
        return self.head(self.embeddings(tiles_NCHW).mean(1))

    def embeddings(self, tiles_NCHW: torch.Tensor) -> torch.Tensor:
        """What the text model gets, [N, M, D]."""
        return self.multi_modal_projector(self.vision_model(tiles_NCHW).last_hidden_state)

    def speaking_weights(self, words_VD: torch.Tensor) -> dict[str, torch.Tensor]:
        """The weights that stay, named as in Llama4ForConditionalGeneration, with the head gone into the projector.

        A token of a tile becomes the sum of the classes' letters as the text model embeds them, each as strong as the
        token speaks for the class. So the text model can read pictures almost at once: what it does with letters, such
        as to copy them, it does with pictures.

        Args:
            words_VD: The text model's embeddings. The token of a byte is the byte's value.
        """
        letters_KD = torch.stack([words_VD[list(letters.encode())].sum(0) for letters in map(letters_of, CLASSES)])
        classes_KD = self.head.weight.detach() - self.head.weight.detach().mean(0)  # softmax sees differences only
        weights = {name: value for name, value in self.state_dict().items() if not name.startswith("head.")}
        projector = "multi_modal_projector.linear_1.weight"
        weights[projector] = LOUDNESS * letters_KD.T @ classes_KD @ weights[projector]
        return weights


@dataclass(frozen=True)
class SightStage:
    """Naming what pictures of one tile show."""

    config: Llama4Config
    spec: ImageSpec
    recipe: Recipe

    def build(self) -> Sight:
        return Sight(self.config)

    def rate_share(self, parameter: str) -> float:
        return 1.0

    def learn(self, model: Sight, rng: random.Random, count: int, step: int) -> dict[str, float]:
        examples = training_examples(rng, count, TASK_WEIGHTS, ONE_TILE_TASKS)
        loss = F.cross_entropy(model(self._tiles(examples)), torch.tensor([class_of(ex) for ex in examples]))
        loss.backward()
        return {"loss": loss.item()}

    @torch.inference_mode()
    def scores(self, model: Sight) -> dict[str, float]:
        watched = evaluation_set(random.Random(self.recipe.seed + 1), WATCHED_PER_TASK, ONE_TILE_TASKS)
        marks: dict[str, list[bool]] = defaultdict(list)
        for example, named in zip(watched, model(self._tiles(watched)).argmax(-1).tolist(), strict=True):
            marks[example.task].append(named == class_of(example))
        return {task: sum(rights) / len(rights) for task, rights in marks.items()}

    def _tiles(self, examples: list[Example]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([to_tiles(example.pictures[0], self.spec) for example in examples]))


def class_of(example: Example) -> int:
    """The class of what an example's picture shows."""
    return CLASSES.index((example.task, example.answer))


def letters_of(named: tuple[str, str]) -> str:
    """The letters that tell a class: a digit, or the beginnings of a colour and of a shape."""
    colour, _, shape = named[1].partition(" ")
    return colour[0] + shape[:2]
