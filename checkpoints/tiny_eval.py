"""Greedy accuracy of the tiny checkpoint by task, and how evenly its experts are used."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from checkpoints.tasks import Example
from engine.image_spec import ImageSpec
from engine.images import choose_grid, image_tokens
from engine.tiles import to_tiles

MAX_ANSWER_TOKENS = 20


def prompt_ids(tokenizer: PreTrainedTokenizerFast, spec: ImageSpec, example: Example) -> list[int]:
    """The question as a single user turn, its pictures first, with the assistant's header opened."""
    content = [*({"type": "image"} for _ in example.pictures), {"type": "text", "text": example.prompt}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    places = iter(image_tokens(choose_grid(*picture.size, spec), spec) for picture in example.pictures)
    ids: list[int] = []
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        ids.extend(next(places) if token == spec.image_token_id else [token])
    return ids


@dataclass(frozen=True)
class PromptBatch:
    """Examples whose prompts are equally long, so that no padding is needed; their pictures' tiles in order."""

    examples: list[Example]
    ids_BL: torch.Tensor
    tiles_NCHW: torch.Tensor | None

    def inputs(self) -> dict[str, torch.Tensor]:
        """What the model takes."""
        pictures = {} if self.tiles_NCHW is None else {"pixel_values": self.tiles_NCHW}
        return {"input_ids": self.ids_BL, "attention_mask": torch.ones_like(self.ids_BL), **pictures}


def prompt_batches(
    tokenizer: PreTrainedTokenizerFast, spec: ImageSpec, examples: Sequence[Example]
) -> Iterator[PromptBatch]:
    """The examples by length of their prompt."""
    groups: dict[int, list[tuple[Example, list[int]]]] = defaultdict(list)
    for example in examples:
        ids = prompt_ids(tokenizer, spec, example)
        groups[len(ids)].append((example, ids))
    for group in groups.values():
        tiles = [torch.from_numpy(to_tiles(picture, spec)) for example, _ in group for picture in example.pictures]
        yield PromptBatch(
            [example for example, _ in group],
            torch.tensor([ids for _, ids in group]),
            torch.cat(tiles) if tiles else None,
        )


@torch.inference_mode()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, spec: ImageSpec, examples: Sequence[Example]
) -> list[tuple[Example, str]]:
    """Every example with the model's greedy answer."""
    results: list[tuple[Example, str]] = []
    for batch in prompt_batches(tokenizer, spec, examples):
        output_BL = model.generate(**batch.inputs(), do_sample=False, max_new_tokens=MAX_ANSWER_TOKENS)
        texts = tokenizer.batch_decode(output_BL[:, batch.ids_BL.shape[1] :], skip_special_tokens=True)
        results.extend(zip(batch.examples, (text.strip() for text in texts), strict=True))
    return results


def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, spec: ImageSpec, examples: Sequence[Example]
) -> dict[str, float]:
    """Share of right answers by task."""
    right: dict[str, list[bool]] = defaultdict(list)
    for example, text in answers(model, tokenizer, spec, examples):
        right[example.task].append(text == example.answer)
    return {example.task: sum(right[example.task]) / len(right[example.task]) for example in examples}


@torch.inference_mode()
def expert_load(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, spec: ImageSpec, examples: Sequence[Example]
) -> dict[int, list[float]]:
    """For every mixture layer, the share of the examples' prompt tokens that each expert receives."""
    config = model.config.get_text_config()
    counts_LE = torch.zeros(len(config.moe_layers), config.num_local_experts)
    for batch in prompt_batches(tokenizer, spec, examples):
        router_logits = model(**batch.inputs(), use_cache=False, output_router_logits=True).router_logits
        for row, logits_TE in enumerate(router_logits):
            counts_LE[row] += logits_TE.argmax(-1).bincount(minlength=counts_LE.shape[1])
    share_LE = counts_LE / counts_LE.sum(-1, keepdim=True)
    return dict(zip(config.moe_layers, share_LE.tolist(), strict=True))
