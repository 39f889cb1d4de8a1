"""Runs requests through a decoder in any order of steps, with the simplest dispatcher and page allocator."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llama4.config import RouterScores, TextConfig
from llama4.kv_pages import Batch, KVPages, Segment
from llama4.moe import Experts
from llama4.weights import Checkpoint, load_decoder, load_experts


class HereDispatcher:
    """Computes everything at once, here. `calls` keeps (layer, rows) of each dispatch."""

    def __init__(self, experts: Experts) -> None:
        self.experts = experts
        self.calls: list[tuple[int, int]] = []

    def dispatch(self, x_ND: Tensor, expert_ids_NK: Tensor, layer: int) -> Tensor:
        self.calls.append((layer, x_ND.shape[0]))
        ids, order = expert_ids_NK.flatten().sort(stable=True)
        present, counts = ids.unique_consecutive(return_counts=True)
        rows = x_ND[order // expert_ids_NK.shape[1]]
        y = torch.empty_like(rows)
        y[order] = self.experts(layer, rows, present.tolist(), counts.tolist())
        return y.view(*expert_ids_NK.shape, -1) if len(y) else y.view(0, expert_ids_NK.shape[1], x_ND.shape[1])

    def combine(self, ticket: Tensor) -> Tensor:
        return ticket


class Runner:
    """A decoder, its pages, and the requests that it runs: request number → token ids."""

    def __init__(
        self,
        path: str | Path,
        requests: Sequence[Sequence[int]],
        *,
        page_size: int,
        seed: int = 0,
        router_scores: RouterScores = "sigmoid",
        drop_old_pages: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config = TextConfig.from_dir(path, router_scores)
        checkpoint = Checkpoint(path)
        all_experts = {layer: range(self.config.num_local_experts) for layer in self.config.moe_layers}
        experts = load_experts(checkpoint, self.config, all_experts, dtype, "cpu")
        self.dispatcher = HereDispatcher(experts)
        self.decoder = load_decoder(checkpoint, self.config, dtype, "cpu")
        self.requests = [list(request) for request in requests]
        self.done = [0] * len(requests)
        self.page_size = page_size
        self.drop_old_pages = drop_old_pages
        per_request = [-(-len(request) // page_size) for request in requests]
        total = sum(per_request) + 1
        self.kv = KVPages(self.config, page_size, {"full": total, "chunked": total}, dtype, "cpu")
        self.pages = []
        free = {kind: list(range(total - 1, -1, -1)) for kind in ("full", "chunked")}
        for kind, ids in free.items():
            random.Random(f"{seed}{kind}").shuffle(ids)
        for count in per_request:
            self.pages.append({kind: [ids.pop() for _ in range(count)] for kind, ids in free.items()})

    def _pages(self, request: int, length: int) -> Mapping[str, Sequence[int | None]]:
        """As the engine would hand them out: no more pages than needed, and none that no row can attend to any more."""
        position = self.done[request]
        needed = -(-(position + length) // self.page_size)
        pages: dict[str, list[int | None]] = {kind: list(ids[:needed]) for kind, ids in self.pages[request].items()}
        if "chunked" in self.config.layer_kinds and self.drop_old_pages:
            history = range(self.config.window_start("chunked", position), position)
            kept = range(self.config.window_start("chunked", position + length - 1), position + length)
            used = {p // self.page_size for p in (*history, *kept)}
            pages["chunked"] = [page if i in used else None for i, page in enumerate(pages["chunked"])]
        return pages

    def step(self, work: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Runs the next `n` tokens of each (request, n); returns their logits [n, V]."""
        token_ids: list[int] = []
        segments = []
        for request, n in work:
            first = self.done[request]
            segments.append(Segment(len(token_ids), n, first, self._pages(request, n)))  # type: ignore[arg-type]
            token_ids += self.requests[request][first : first + n]
        hidden = self.decoder(Batch.of(token_ids, segments), self.kv, self.dispatcher)
        for request, n in work:
            self.done[request] += n
        return list(self.decoder.logits(hidden).split([n for _, n in work]))

    def run(self, steps: Sequence[Sequence[tuple[int, int]]]) -> list[Tensor]:
        """All logits of each request [its length, V], over these steps."""
        parts: list[list[Tensor]] = [[] for _ in self.requests]
        for work in steps:
            for (request, _), logits in zip(work, self.step(work), strict=True):
                parts[request].append(logits)
        return [torch.cat(part) for part in parts]
