"""The training loop: single-threaded worker processes, each with its share of every batch, averaging gradients.

Matrices this small gain little from a second thread but much from a second process.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import torch.multiprocessing as mp
from torch import nn
from tqdm import tqdm

from checkpoints.tiny_model import grouped_experts

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Recipe:
    """Optimisation settings."""

    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    watch_every: int
    warmup_steps: int = 100
    cooldown_share: float = 0.35
    weight_decay: float = 0.05
    clip_norm: float = 1.0

    def rate_at(self, step: int) -> float:
        """Learning rate: a warm-up, a plateau, and a straight line to 0 over the last `cooldown_share` of the steps."""
        left = (self.steps - step) / (self.cooldown_share * self.steps)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps, left)


class Stage(Protocol[Model]):
    """What is trained, on what, and how it is watched. Pickled to every worker."""

    @property
    def recipe(self) -> Recipe:
        """How to optimise."""

    def build(self) -> Model:
        """The model as training finds it; draws its random weights from torch's global generator."""

    def rate_share(self, parameter: str) -> float:
        """What a parameter's learning rate is multiplied by."""

    def learn(self, model: Model, rng: random.Random, count: int, step: int) -> dict[str, float]:
        """Draw one worker's `count` samples of a step, leave their mean loss's gradients, and return the losses."""

    def scores(self, model: Model) -> dict[str, float]:
        """Accuracy by task on a few held-out questions, for progress reports."""


class GradientExchange:
    """Averages gradients between the worker processes of this machine through shared memory.

    Two tables of one row per worker take turns, so that one meeting a step is enough: nobody can be a step ahead of
    a worker that still reads.
    """

    def __init__(self, workers: int, size: int) -> None:
        self._tables_WP = [torch.zeros(workers, size).share_memory_() for _ in range(2)]
        self._meeting = mp.get_context("spawn").Barrier(workers)

    def average(self, model: nn.Module, rank: int, step: int) -> None:
        """Replace this worker's gradients by the mean over workers, the same to the bit in all of them."""
        table_WP = self._tables_WP[step % 2]
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        torch.cat([gradient.flatten() for gradient in gradients], out=table_WP[rank])
        self._meeting.wait()
        parts = table_WP.mean(0).split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def build_optimizer(model: Model, stage: Stage[Model]) -> torch.optim.AdamW:
    """AdamW that leaves norms' scales and biases undecayed; each group keeps the share of the learning rate it gets."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        decay = stage.recipe.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((stage.rate_share(name), decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": group, "weight_decay": decay, "share": share} for (share, decay), group in groups.items()],
        lr=stage.recipe.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )


def _work(
    rank: int, workers: int, exchange: GradientExchange, scratch: Path, stage: Stage[Model], state_path: Path | None
) -> None:
    """One worker's whole training; worker 0 reports, saves and leaves the weights in `scratch`."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    recipe = stage.recipe
    torch.manual_seed(recipe.seed)
    model = stage.build().float().train()
    optimizer = build_optimizer(model, stage)
    first, earlier_seconds, started = 0, 0.0, time.monotonic()
    if state_path is not None and state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, earlier_seconds = state["step"], state["seconds"]
    if rank == 0:
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, from step {first}", flush=True)
    progress = tqdm(range(first, recipe.steps), desc="train", mininterval=10.0, disable=rank != 0)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate_at(step) * group["share"]
        # A stream of its own for every step and worker makes a continued run equal to an uninterrupted one.
        rng = random.Random(f"{recipe.seed}/{step}/{rank}")
        losses = stage.learn(model, rng, recipe.batch_size // workers, step)
        exchange.average(model, rank, step)
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        done = step + 1
        if rank == 0 and done % recipe.watch_every == 0 and done < recipe.steps:
            figures = {**losses, **stage.scores(model.eval())}
            model.train()
            shown = " ".join(f"{name}={figure:.2f}" for name, figure in figures.items())
            tqdm.write(f"step {done} {shown}", file=sys.stdout)
            sys.stdout.flush()
            if state_path is not None:
                seconds = earlier_seconds + time.monotonic() - started
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                state |= {"step": done, "seconds": seconds}
                torch.save(state, state_path.with_suffix(".part"))
                state_path.with_suffix(".part").replace(state_path)
    if rank == 0:
        seconds = earlier_seconds + time.monotonic() - started
        torch.save({"model": model.state_dict(), "seconds": seconds}, scratch / "result.pt")


def _work_grouped(rank: int, *args: object) -> None:
    with grouped_experts():
        _work(rank, *args)  # type: ignore[arg-type]


def train(stage: Stage[Model], workers: int, state_path: Path | None = None) -> tuple[Model, float]:
    """Train one stage; return the model with the seconds spent, those before a continuation included.

    Args:
        stage: What to train.
        workers: Processes, one CPU core each. The sample streams, and so the weights, depend on their number.
        state_path: When given, training is saved here at every progress report, and continued from here if it exists.
    """
    model = stage.build().float()
    exchange = GradientExchange(workers, sum(p.numel() for p in model.parameters() if p.requires_grad))
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        mp.spawn(_work_grouped, args=(workers, exchange, scratch, stage, state_path), nprocs=workers)
        result = torch.load(scratch / "result.pt", weights_only=True)
    model.load_state_dict(result["model"])
    return model.eval(), result["seconds"]
