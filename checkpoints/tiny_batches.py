"""Turns task questions into token batches: chat turns, conversations, plain completions."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from checkpoints.tasks import WORDS, Example, training_examples
from engine.image_spec import ImageSpec
from engine.images import choose_grid, image_tokens
from engine.tiles import to_tiles

IGNORED = -100
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are Herder, a small model. Answer each question as shortly as you can.",
    "Be concise.",
)
PLAIN_SHARE = 0.06
LISTING_SHARE = 0.45
MULTI_TURN_SHARE = 0.06
SYSTEM_SHARE = 0.04
LISTING_LENGTHS = (4, 6)
# From which step on, how often each task is drawn relative to the others. Recall is learned last: it has to find a key
# by content, where the other tasks go by place.
TASK_WEIGHTS = (
    (
        0,
        {
            "addition": 2.0,
            "subtraction": 2.5,
            "copy": 1.0,
            "reverse": 1.2,
            "recall": 2.0,
            "letters": 2.0,
            "weekday": 1.8,
        },
    ),
    (
        1750,
        {
            "addition": 1.8,
            "subtraction": 2.0,
            "copy": 0.8,
            "reverse": 1.2,
            "recall": 5.0,
            "letters": 0.8,
            "weekday": 2.0,
        },
    ),
    (
        2750,
        {
            "addition": 1.5,
            "subtraction": 1.5,
            "copy": 1.0,
            "reverse": 1.2,
            "recall": 2.5,
            "letters": 0.8,
            "weekday": 4.0,
        },
    ),
)


def weights_at(step: int) -> dict[str, float]:
    """The tasks' weights in a training step."""
    return [weights for first, weights in TASK_WEIGHTS if first <= step][-1]


@dataclass
class Sample:
    """Token ids, at each place whether the token is one the model has to produce, and the pictures' tiles in order."""

    ids: list[int] = field(default_factory=list)
    answered: list[bool] = field(default_factory=list)
    tiles_NCHW: list[np.ndarray] = field(default_factory=list)

    def add(self, ids: list[int], answered: bool) -> None:
        """Append tokens."""
        self.ids.extend(ids)
        self.answered.extend([answered] * len(ids))


def plain_prompt(example: Example) -> str:
    """The question as the beginning of a text: a question that does not end in "=" is answered on the next line."""
    return example.prompt if example.prompt.endswith("=") else example.prompt + "\n"


class Encoder:
    """Writes samples token by token, equal to the chat template's rendering but far faster than Jinja."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, spec: ImageSpec) -> None:
        self._spec = spec
        special = tokenizer.convert_tokens_to_ids
        self._tokenizer = tokenizer
        self.bos, self.eot = special("<|begin_of_text|>"), special("<|eot|>")
        self.end, self.pad = special("<|end_of_text|>"), special("<|finetune_right_pad|>")
        self._headers = {
            role: self._encode(f"<|header_start|>{role}<|header_end|>\n\n") for role in ("system", "user", "assistant")
        }

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def conversation(self, examples: list[Example], system: str | None = None, *, prompt_first: bool = False) -> Sample:
        """A chat in which every example is a question and its answer; pictures precede the prompt or follow it."""
        sample = Sample()
        sample.add([self.bos], answered=False)
        if system is not None:
            sample.add([*self._headers["system"], *self._encode(system), self.eot], answered=False)
        for example in examples:
            prompt = self._encode(example.prompt)
            sample.add([*self._headers["user"], *(prompt if prompt_first else ())], answered=False)
            self._show(sample, *example.pictures)
            sample.add([*(() if prompt_first else prompt), self.eot], answered=False)
            sample.add(self._headers["assistant"], answered=False)
            sample.add([*self._encode(example.answer), self.eot], answered=True)
        return sample

    def _show(self, sample: Sample, *pictures: Image.Image) -> None:
        for picture in pictures:
            sample.add(image_tokens(choose_grid(*picture.size, self._spec), self._spec), answered=False)
            sample.tiles_NCHW.append(to_tiles(picture, self._spec))

    def completion(self, example: Example) -> Sample:
        """The question and its answer as running text."""
        sample = Sample()
        sample.add([self.bos, *self._encode(plain_prompt(example))], answered=False)
        sample.add([*self._encode(example.answer), self.end], answered=True)
        return sample

    def listing(self, examples: list[Example]) -> Sample:
        """Several questions and answers as one running text, which costs a third of as many chat turns.

        The line break after an answer is not learned: on its own, an answered question ends the text.
        """
        sample = Sample()
        sample.add([self.bos], answered=False)
        for number, example in enumerate(examples):
            sample.add(self._encode(("\n" if number else "") + plain_prompt(example)), answered=False)
            sample.add(self._encode(example.answer), answered=True)
        sample.add([self.end], answered=True)
        return sample

    def captions(self, examples: list[Example]) -> Sample:
        """Pictures in a row, each followed by the answer without a question: a fifth of the tokens of a chat."""
        sample = Sample()
        sample.add([self.bos], answered=False)
        for example in examples:
            self._show(sample, *example.pictures)
            sample.add(self._encode(example.answer), answered=True)
        sample.add([self.end], answered=True)
        return sample

    def training_samples(self, rng: random.Random, count: int, weights: Mapping[str, float]) -> list[Sample]:
        """Samples of tasks drawn by weight, their forms in the proportions set at the top of this module."""
        samples = []
        for _ in range(count):
            kind = rng.random()
            if kind < PLAIN_SHARE:
                samples.append(self.completion(training_examples(rng, 1, weights)[0]))
                continue
            if kind < PLAIN_SHARE + LISTING_SHARE:
                samples.append(self.listing(training_examples(rng, rng.randint(*LISTING_LENGTHS), weights)))
                continue
            turns = rng.choice((2, 3)) if rng.random() < MULTI_TURN_SHARE else 1
            system = None
            if rng.random() < SYSTEM_SHARE:
                # Instructions of any length move the question along the attention chunks.
                fixed = rng.random() < 0.6
                system = rng.choice(SYSTEM_PROMPTS) if fixed else " ".join(rng.choices(WORDS, k=rng.randint(1, 10)))
            samples.append(self.conversation(training_examples(rng, turns, weights), system))
        return samples


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids, next-token labels (IGNORED where nothing is to be learned) and the real-token mark.

    The tiles of all pictures stand in the order of their places in ids_BL; None when there are none.
    """

    ids_BL: torch.Tensor
    labels_BL: torch.Tensor
    real_BL: torch.Tensor
    tiles_NCHW: torch.Tensor | None


def collate(samples: list[Sample], pad: int) -> Batch:
    """Pad to the longest. Attention is causal, so padding on the right needs no attention mask."""
    length = max(len(sample.ids) for sample in samples)
    ids, labels, real = [], [], []
    for sample in samples:
        missing = length - len(sample.ids)
        targets = [token if answered else IGNORED for token, answered in zip(sample.ids, sample.answered, strict=True)]
        ids.append(sample.ids + [pad] * missing)
        labels.append(targets[1:] + [IGNORED] * (missing + 1))
        real.append([True] * len(sample.ids) + [False] * missing)
    tiles = [torch.from_numpy(tiles_NCHW) for sample in samples for tiles_NCHW in sample.tiles_NCHW]
    tiles_NCHW = torch.cat(tiles) if tiles else None
    return Batch(torch.tensor(ids), torch.tensor(labels), torch.tensor(real), tiles_NCHW)


def micro_batches(samples: list[Sample], bounds: Sequence[float], pad: int) -> list[Batch]:
    """Split one step's samples by length at the given quantiles, so that little arithmetic is spent on padding."""
    ordered = sorted(samples, key=lambda sample: len(sample.ids))
    cuts = [0, *(round(bound * len(ordered)) for bound in bounds)]
    return [collate(ordered[start:end], pad) for start, end in itertools.pairwise(cuts) if end > start]
