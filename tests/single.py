"""The single-process run that the distributed one is held against: the same engine, all experts in this process."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch

from dispatch.local import LocalDispatcher
from engine.engine import Engine, SoloGate, StepGate
from engine.micro_batching import MicroBatching
from engine.pages import LayerGroup, PageAllocator
from engine.request import Request, RequestOutput
from engine.scheduler import Limits, Scheduler
from engine.step import Stepper
from llama4.config import TextConfig
from llama4.kv_pages import KVPages
from llama4.moe import Dispatcher
from llama4.weights import Checkpoint, load_decoder, load_experts


class SingleProcess:
    """An engine over one checkpoint in float32, run on a thread. `wrap` may put something before its experts."""

    def __init__(
        self,
        path: Path,
        *,
        page_size: int = 16,
        pages: int = 512,
        max_batch_tokens: int = 256,
        max_running: int = 64,
        micro_batches: Literal[1, 2] = 1,
        gate: StepGate | None = None,
        wrap: Callable[[Dispatcher], Dispatcher] = lambda dispatcher: dispatcher,
    ) -> None:
        config = TextConfig.from_dir(path)
        checkpoint = Checkpoint(path)
        everything = {layer: range(config.num_local_experts) for layer in config.moe_layers}
        experts = load_experts(checkpoint, config, everything, torch.float32, "cpu")
        decoder = load_decoder(checkpoint, config, torch.float32, "cpu")
        groups = {
            kind: LayerGroup(pages, config.attention_chunk_size if kind == "chunked" else None)
            for kind in set(config.layer_kinds)
        }
        kv = KVPages(config, page_size, {kind: pages for kind in groups}, torch.float32, "cpu")
        scheduler = Scheduler(
            Limits(max_batch_tokens, max_running, 10_000),
            PageAllocator(groups, page_size),
            clock=time.time,
        )
        dispatcher = wrap(LocalDispatcher(experts, config.num_local_experts))
        micro_batching = MicroBatching(micro_batches)
        stepper = Stepper(decoder, kv, dispatcher, config.max_position_embeddings, micro_batching)
        self.config = config
        self.scheduler = scheduler
        self.engine = Engine(scheduler, stepper, gate or SoloGate(), self._deliver)
        self.outputs: dict[str, list[RequestOutput]] = defaultdict(list)
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self.engine.run, daemon=True)
        self._thread.start()

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        with self._changed:
            for output in outputs:
                self.outputs[output.request_id].append(output)
            self._changed.notify_all()

    def wait(self, request_ids: Sequence[str], timeout: float = 120.0) -> None:
        """Until all of these have ended."""
        with self._changed:
            ended = self._changed.wait_for(
                lambda: all(self.outputs[name] and self.outputs[name][-1].finish_reason for name in request_ids),
                timeout,
            )
        assert ended, "requests did not end in time"

    def run(self, requests: Sequence[Request]) -> dict[str, list[RequestOutput]]:
        """All outputs of these requests, run together."""
        for request in requests:
            self.engine.submit(request)
        names = [request.request_id for request in requests]
        self.wait(names)
        return {name: self.outputs[name] for name in names}

    def tokens(self, requests: Sequence[Request]) -> dict[str, list[int]]:
        """The tokens that these requests give."""
        return {
            name: [token for output in outputs for token in output.token_ids]
            for name, outputs in self.run(requests).items()
        }

    def close(self) -> None:
        self.engine.stop()
        self._thread.join(timeout=10)
