"""transformers on the same checkpoint, for comparison. Its experts are computed for all rows, chosen or not."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers


class Reference:
    """`Llama4ForCausalLM` in float32 with its own cache."""

    def __init__(self, path: Path) -> None:
        self._model: Any = transformers.Llama4ForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="sdpa"
        )
        self._generator = torch.Generator().manual_seed(1)

    def _tokens(self, batch: int, length: int) -> torch.Tensor:
        return torch.randint(0, self._model.config.vocab_size, (batch, length), generator=self._generator)

    @torch.inference_mode()
    def decode(self, batch: int, context: int, steps: int) -> float:
        """Median seconds of a greedy step."""
        out = self._model(self._tokens(batch, context), use_cache=True, logits_to_keep=1)
        found = []
        for _ in range(steps + 1):
            start = time.perf_counter()
            chosen = out.logits[:, -1:].argmax(-1)
            out = self._model(chosen, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
            found.append(time.perf_counter() - start)
        return statistics.median(found[1:])

    @torch.inference_mode()
    def prefill(self, tokens: int, repeats: int) -> float:
        """Median seconds to the first token."""
        found = []
        for _ in range(repeats + 1):
            prompt = self._tokens(1, tokens)
            start = time.perf_counter()
            self._model(prompt, use_cache=True, logits_to_keep=1).logits.argmax(-1)
            found.append(time.perf_counter() - start)
        return statistics.median(found[1:])
