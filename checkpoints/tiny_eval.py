"""Greedy accuracy of the tiny checkpoint by task, and how evenly its experts are used."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from transformers import Llama4ForCausalLM, PreTrainedTokenizerFast

from checkpoints.tasks import Example

MAX_ANSWER_TOKENS = 14


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """The prompt as a single user turn, with the assistant's header opened."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False).input_ids


def _by_length(
    tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]
) -> list[tuple[list[Example], torch.Tensor]]:
    """Examples grouped by prompt length with their [B, L] ids, so that no batch needs padding."""
    groups: dict[int, list[tuple[Example, list[int]]]] = defaultdict(list)
    for example in examples:
        ids = prompt_ids(tokenizer, example.prompt)
        groups[len(ids)].append((example, ids))
    return [([example for example, _ in group], torch.tensor([ids for _, ids in group])) for group in groups.values()]


@torch.inference_mode()
def answers(
    model: Llama4ForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]
) -> list[tuple[Example, str]]:
    """Every example with the model's greedy answer."""
    results: list[tuple[Example, str]] = []
    for group, ids_BL in _by_length(tokenizer, examples):
        output_BL = model.generate(
            ids_BL, attention_mask=torch.ones_like(ids_BL), do_sample=False, max_new_tokens=MAX_ANSWER_TOKENS
        )
        texts = tokenizer.batch_decode(output_BL[:, ids_BL.shape[1] :], skip_special_tokens=True)
        results.extend(zip(group, (text.strip() for text in texts), strict=True))
    return results


def accuracy(
    model: Llama4ForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]
) -> dict[str, float]:
    """Share of right answers by task."""
    right: dict[str, list[bool]] = defaultdict(list)
    for example, text in answers(model, tokenizer, examples):
        right[example.task].append(text == example.answer)
    return {task: sum(marks) / len(marks) for task, marks in right.items()}


@torch.inference_mode()
def expert_load(
    model: Llama4ForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]
) -> dict[int, list[float]]:
    """For every mixture layer, the share of the examples' prompt tokens that each expert receives."""
    layers = model.config.moe_layers
    counts_LE = torch.zeros(len(layers), model.config.num_local_experts)
    for _, ids_BL in _by_length(tokenizer, examples):
        router_logits = model(input_ids=ids_BL, use_cache=False, output_router_logits=True).router_logits
        for row, logits_TE in enumerate(router_logits):
            counts_LE[row] += logits_TE.argmax(-1).bincount(minlength=counts_LE.shape[1])
    share_LE = counts_LE / counts_LE.sum(-1, keepdim=True)
    return dict(zip(layers, share_LE.tolist(), strict=True))
