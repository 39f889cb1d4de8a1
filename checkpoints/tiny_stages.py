"""The stages of training a language model: text from random weights, then pictures on top of the text model."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from transformers import Llama4Config, Llama4ForCausalLM, Llama4ForConditionalGeneration, PreTrainedTokenizerFast

from checkpoints.pictures import ONE_TILE_TASKS, PICTURE_TASKS
from checkpoints.tasks import TASKS, evaluation_set, training_examples
from checkpoints.tiny_batches import IGNORED, Encoder, Sample, micro_batches, weights_at
from checkpoints.tiny_eval import accuracy
from checkpoints.tiny_model import balance_loss
from checkpoints.tiny_training import Recipe
from engine.image_spec import ImageSpec

TEXT_RECIPE = Recipe(steps=3100, batch_size=64, learning_rate=2e-3, seed=4, watch_every=125)
PICTURE_RECIPE = Recipe(steps=2100, batch_size=32, learning_rate=1.2e-3, seed=4, watch_every=100, warmup_steps=50)
WATCHED_PER_TASK = 20
BALANCE_WEIGHT = 0.01
LENGTH_QUANTILES = (0.4, 0.7, 0.9, 1.0)

# The text model moves slowly while it learns to read pictures, and keeps answering text questions meanwhile.
LANGUAGE_RATE_SHARE = 0.7
TEXT_SHARE = 0.2
CAPTIONS_SHARE = 0.3
CAPTIONS = (4, 6)
PROMPT_FIRST_SHARE = 0.2
SECOND_TURN_SHARE = 0.1
CAPTION_WEIGHTS = {"digit": 1.2, "shape": 0.8, "dots": 2.5}
PICTURE_WEIGHTS = CAPTION_WEIGHTS | {"compare": 2.0}


@dataclass(frozen=True)
class LanguageStage(ABC):
    """What both stages share: samples are token sequences, the answers' tokens are learned."""

    config: Llama4Config
    tokenizer: PreTrainedTokenizerFast
    spec: ImageSpec
    recipe: Recipe

    @cached_property
    def encoder(self) -> Encoder:
        """Writes the samples."""
        return Encoder(self.tokenizer, self.spec)

    @abstractmethod
    def samples(self, rng: random.Random, count: int, step: int) -> list[Sample]:
        """One worker's samples for a step."""

    def learn(
        self, model: Llama4ForCausalLM | Llama4ForConditionalGeneration, rng: random.Random, count: int, step: int
    ) -> dict[str, float]:
        """Accumulate the gradients of the mean answer loss and of the mixture layers' balance loss."""
        batches = micro_batches(self.samples(rng, count, step), LENGTH_QUANTILES, self.encoder.pad)
        targets = sum(int((batch.labels_BL != IGNORED).sum()) for batch in batches)
        tokens = sum(int(batch.real_BL.sum()) for batch in batches)
        answer_total, balance_total = 0.0, 0.0
        for batch in batches:
            pictures = {} if batch.tiles_NCHW is None else {"pixel_values": batch.tiles_NCHW}
            output = model(input_ids=batch.ids_BL, **pictures, use_cache=False, output_router_logits=True)
            learned_BL = batch.labels_BL != IGNORED
            answer = F.cross_entropy(output.logits[learned_BL], batch.labels_BL[learned_BL], reduction="sum") / targets
            share = float(batch.real_BL.sum()) / tokens
            balance = balance_loss(output.router_logits, batch.real_BL.flatten()) * share
            (answer + BALANCE_WEIGHT * balance).backward()
            answer_total += answer.item()
            balance_total += balance.item()
        return {"loss": answer_total, "balance": balance_total}


@dataclass(frozen=True)
class TextStage(LanguageStage):
    """A text model from random weights."""

    def build(self) -> Llama4ForCausalLM:
        return Llama4ForCausalLM(self.config.text_config)

    def rate_share(self, parameter: str) -> float:
        return 1.0

    def samples(self, rng: random.Random, count: int, step: int) -> list[Sample]:
        return self.encoder.training_samples(rng, count, weights_at(step))

    def scores(self, model: Llama4ForCausalLM) -> dict[str, float]:
        watched = evaluation_set(random.Random(self.recipe.seed + 1), WATCHED_PER_TASK, TASKS)
        return accuracy(model, self.tokenizer, self.spec, watched)


@dataclass(frozen=True)
class PictureStage(LanguageStage):
    """A vision tower in front of a text model, both trained before; `weights` are those of the two together."""

    weights: dict[str, torch.Tensor]

    def build(self) -> Llama4ForConditionalGeneration:
        model = Llama4ForConditionalGeneration(self.config)
        model.load_state_dict(self.weights)
        return model

    def rate_share(self, parameter: str) -> float:
        return LANGUAGE_RATE_SHARE if parameter.startswith("language_model.") else 1.0

    def samples(self, rng: random.Random, count: int, step: int) -> list[Sample]:
        texts = round(count * TEXT_SHARE)
        text_weights = weights_at(TEXT_RECIPE.steps)
        return [
            *self.encoder.training_samples(rng, texts, text_weights),
            *(self._picture_sample(rng, text_weights) for _ in range(count - texts)),
        ]

    def _picture_sample(self, rng: random.Random, text_weights: dict[str, float]) -> Sample:
        """Captions, or a question about pictures, now and then with another question after or before it."""
        if rng.random() < CAPTIONS_SHARE:
            count = rng.randint(*CAPTIONS)
            return self.encoder.captions(training_examples(rng, count, CAPTION_WEIGHTS, ONE_TILE_TASKS))
        turns = training_examples(rng, 1, PICTURE_WEIGHTS, PICTURE_TASKS)
        if rng.random() < SECOND_TURN_SHARE:
            turns += training_examples(rng, 1, text_weights, TASKS)
            rng.shuffle(turns)
        return self.encoder.conversation(turns, prompt_first=rng.random() < PROMPT_FIRST_SHARE)

    def scores(self, model: Llama4ForConditionalGeneration) -> dict[str, float]:
        watched = evaluation_set(random.Random(self.recipe.seed + 1), WATCHED_PER_TASK, TASKS | PICTURE_TASKS)
        return accuracy(model, self.tokenizer, self.spec, watched)
