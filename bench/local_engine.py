"""A whole engine in this process, driven step by step: what bench.engine measures."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import engine.step
import llama4.decoder
from bench.common import apart
from bench.stopwatch import Stopwatch
from dispatch.local import LocalDispatcher
from engine.engine import Engine, SoloGate, StepGate
from engine.pages import LayerGroup, PageAllocator
from engine.request import Request, RequestOutput, SamplingParams
from engine.scheduler import Limits, Scheduler
from engine.step import Stepper
from llama4.config import TextConfig
from llama4.decoder import Decoder
from llama4.kv_pages import KVPages
from llama4.moe import Dispatcher, Experts
from llama4.openmp import bind_threads
from llama4.weights import Checkpoint, load_decoder, load_experts

TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Shape:
    """The engine's limits. `kv_tokens`: room in the page pool of each layer kind."""

    max_batch_tokens: int = 2048
    max_running: int = 64
    page_size: int = 16
    kv_tokens: int = 36 << 10


@dataclass(frozen=True, slots=True)
class Step:
    """One step: when its outputs came, how many there were, and the stopwatch's totals by then."""

    at: float
    outputs: int
    totals: dict[str, float]


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """Steps in which every sequence of the batch got one token.

    `seconds`: from one step's outputs to the next one's. `parts`: the stopwatch's sums by label, a mean per step.
    """

    batch: int
    seconds: tuple[float, ...]
    parts: dict[str, float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.seconds)


class LocalEngine:
    """An engine on a thread of its own over `decoder` and the experts behind `dispatcher`."""

    def __init__(
        self, config: TextConfig, decoder: Decoder, dispatcher: Dispatcher, gate: StepGate, shape: Shape
    ) -> None:
        self.config = config
        self.watch = Stopwatch()
        self.watch.time(Decoder, "__call__", "decoder")
        self.watch.time(Decoder, "logits", "head")
        self.watch.time(llama4.decoder, "plan_step", "plan")
        self.watch.time(engine.step, "sample", "sample")
        self._steps: list[Step] = []
        self._ended: set[str] = set()
        self._changed = threading.Condition()
        self._names = itertools.count()
        self._generator = torch.Generator().manual_seed(1)
        pages = shape.kv_tokens // shape.page_size
        groups = {
            kind: LayerGroup(pages, config.attention_chunk_size if kind == "chunked" else None)
            for kind in set(config.layer_kinds)
        }
        kv = KVPages(config, shape.page_size, dict.fromkeys(groups, pages), torch.float32, "cpu")
        apart(kv.take_memory)  # as an attention actor does
        scheduler = Scheduler(
            Limits(shape.max_batch_tokens, shape.max_running, 10_000),
            PageAllocator(groups, shape.page_size),
            clock=time.time,
        )
        stepper = Stepper(decoder, kv, dispatcher, config.max_position_embeddings)
        self._engine = Engine(scheduler, stepper, gate, self._deliver)
        self._thread = threading.Thread(target=self._compute, name="engine", daemon=True)
        self._thread.start()

    def _compute(self) -> None:
        bind_threads(-1)  # as an attention actor of rank 0
        self._engine.run()

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        self._steps.append(Step(time.perf_counter(), len(outputs), dict(self.watch.totals)))
        ended = {output.request_id for output in outputs if output.finish_reason is not None}
        if ended:
            with self._changed:
                self._ended |= ended
                self._changed.notify_all()

    def _run(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Step]:
        self._steps.clear()
        names = {f"bench-{next(self._names)}" for _ in prompts}
        for name, prompt in zip(sorted(names), prompts, strict=True):
            self._engine.submit(Request(name, tuple(prompt), params))
        with self._changed:
            if not self._changed.wait_for(lambda: names <= self._ended or not self._thread.is_alive(), TIMEOUT_S):
                raise TimeoutError(f"{len(prompts)} requests did not end in {TIMEOUT_S:.0f} s")
        assert names <= self._ended, "the engine has stopped"
        return list(self._steps)

    def prompt(self, length: int) -> list[int]:
        """Random tokens, different each time, so that no prefix is cached."""
        return torch.randint(0, self.config.vocab_size, (length,), generator=self._generator).tolist()

    def decode(self, batch: int, context: int, steps: int, temperature: float = 0.0) -> DecodeRun:
        """`batch` sequences decode together for about `steps` steps, from `context` tokens on."""
        # The first sequence is prefilled, and decodes, before the last one is.
        lead = -(-batch * context // 1024)
        params = SamplingParams(max_tokens=steps + lead + 2, temperature=temperature, ignore_eos=True, seed=1)
        found = self._run([self.prompt(context) for _ in range(batch)], params)
        pairs = [(a, b) for a, b in itertools.pairwise(found) if a.outputs == b.outputs == batch][-steps:]
        assert pairs, "no step had the whole batch"
        first, last = pairs[0][0], pairs[-1][1]
        parts = {name: (last.totals[name] - first.totals.get(name, 0.0)) / len(pairs) for name in last.totals}
        return DecodeRun(batch, tuple(b.at - a.at for a, b in pairs), parts)

    def prefill(self, tokens: int, repeats: int) -> list[float]:
        """Seconds from a prompt's submission to its first token, each time."""
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        found = []
        for _ in range(repeats + 1):
            prompt = self.prompt(tokens)
            start = time.perf_counter()
            found.append(self._run([prompt], params)[-1].at - start)
        return found[1:]

    def close(self) -> None:
        self._engine.stop()
        self._thread.join(TIMEOUT_S)
        self.watch.close()


def load_everything(path: Path, on_progress: Callable[[int, int], None] | None = None) -> tuple[Decoder, Experts]:
    """The whole text model in float32."""
    config, checkpoint = TextConfig.from_dir(path), Checkpoint(path)
    everything = {layer: range(config.num_local_experts) for layer in config.moe_layers}
    decoder = load_decoder(checkpoint, config, torch.float32, "cpu", on_progress)
    return decoder, load_experts(checkpoint, config, everything, torch.float32, "cpu", on_progress)


def single_process(path: Path, shape: Shape) -> LocalEngine:
    """The engine with all experts in this process; its stopwatch counts `experts_hit`, (layer, expert) pairs a step."""
    decoder, experts = apart(lambda: load_everything(path))
    config = decoder.config
    made = LocalEngine(config, decoder, LocalDispatcher(experts, config.num_local_experts), SoloGate(), shape)
    made.watch.count(
        Experts, "__call__", "experts_hit", lambda self, layer, x_ND, ids, counts: sum(n > 0 for n in counts)
    )
    return made
