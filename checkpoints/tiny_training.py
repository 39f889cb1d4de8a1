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

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from tqdm import tqdm
from transformers import Llama4Config, Llama4ForCausalLM, PreTrainedTokenizerFast

from checkpoints.tasks import evaluation_set
from checkpoints.tiny_batches import IGNORED, Batch, Encoder, micro_batches, weights_at
from checkpoints.tiny_eval import accuracy
from checkpoints.tiny_model import balance_loss, grouped_experts

PROGRESS_PER_TASK = 20


@dataclass(frozen=True)
class Recipe:
    """Optimisation settings. The defaults are those of the bundled checkpoint."""

    steps: int = 3100
    batch_size: int = 64
    learning_rate: float = 2e-3
    seed: int = 4
    watch_every: int = 125
    length_quantiles: tuple[float, ...] = (0.4, 0.7, 1.0)
    warmup_steps: int = 100
    cooldown_share: float = 0.35
    weight_decay: float = 0.05
    balance_weight: float = 0.01
    clip_norm: float = 1.0

    def rate_at(self, step: int) -> float:
        """Learning rate: a warm-up, a plateau, and a straight line to 0 over the last `cooldown_share` of the steps."""
        left = (self.steps - step) / (self.cooldown_share * self.steps)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps, left)


def backward(model: Llama4ForCausalLM, batches: list[Batch], balance_weight: float) -> tuple[float, float]:
    """Accumulate the gradients of one step; return the mean answer loss and the mean balance loss."""
    targets = sum(int((batch.labels_BL != IGNORED).sum()) for batch in batches)
    tokens = sum(int(batch.real_BL.sum()) for batch in batches)
    answer_total, balance_total = 0.0, 0.0
    for batch in batches:
        output = model(input_ids=batch.ids_BL, use_cache=False, output_router_logits=True)
        learned_BL = batch.labels_BL != IGNORED
        answer = F.cross_entropy(output.logits[learned_BL], batch.labels_BL[learned_BL], reduction="sum") / targets
        share = float(batch.real_BL.sum()) / tokens
        balance = balance_loss(output.router_logits, batch.real_BL.flatten()) * share
        (answer + balance_weight * balance).backward()
        answer_total += answer.item()
        balance_total += balance.item()
    return answer_total, balance_total


class GradientExchange:
    """Averages gradients between the worker processes of this machine through shared memory.

    Two tables of one row per worker take turns, so that one meeting a step is enough: nobody can be a step ahead of
    a worker that still reads.
    """

    def __init__(self, workers: int, size: int) -> None:
        self._tables_WP = [torch.zeros(workers, size).share_memory_() for _ in range(2)]
        self._meeting = mp.get_context("spawn").Barrier(workers)

    def average(self, model: Llama4ForCausalLM, rank: int, step: int) -> None:
        """Replace this worker's gradients by the mean over workers, the same to the bit in all of them."""
        table_WP = self._tables_WP[step % 2]
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        torch.cat([gradient.flatten() for gradient in gradients], out=table_WP[rank])
        self._meeting.wait()
        parts = table_WP.mean(0).split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def build_optimizer(model: Llama4ForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that leaves the norms' scales undecayed."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    scales = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": scales, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)


def _work(
    rank: int,
    workers: int,
    exchange: GradientExchange,
    scratch: Path,
    config: Llama4Config,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    state_path: Path | None,
) -> None:
    """One worker's whole training; worker 0 reports, saves and leaves the weights in `scratch`."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(recipe.seed)
    model = Llama4ForCausalLM(config.text_config).float().train()
    optimizer = build_optimizer(model, recipe)
    first, earlier_seconds, started = 0, 0.0, time.monotonic()
    if state_path is not None and state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, earlier_seconds = state["step"], state["seconds"]
    if rank == 0:
        print(f"{sum(p.numel() for p in model.parameters()):,} text parameters, from step {first}", flush=True)
    encoder = Encoder(tokenizer)
    watched = evaluation_set(random.Random(recipe.seed + 1), PROGRESS_PER_TASK)
    progress = tqdm(range(first, recipe.steps), desc="train", mininterval=10.0, disable=rank != 0)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate_at(step)
        # A stream of its own for every step and worker makes a continued run equal to an uninterrupted one.
        rng = random.Random(f"{recipe.seed}/{step}/{rank}")
        samples = encoder.training_samples(rng, recipe.batch_size // workers, weights_at(step))
        answer, balance = backward(
            model, micro_batches(samples, recipe.length_quantiles, encoder.pad), recipe.balance_weight
        )
        exchange.average(model, rank, step)
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        done = step + 1
        if rank == 0 and done % recipe.watch_every == 0 and done < recipe.steps:
            scores = accuracy(model.eval(), tokenizer, watched)
            model.train()
            shown = " ".join(f"{task}={score:.2f}" for task, score in scores.items())
            tqdm.write(f"step {done} loss={answer:.3f} balance={balance:.2f} {shown}", file=sys.stdout)
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


def train(
    config: Llama4Config,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    workers: int,
    state_path: Path | None = None,
) -> tuple[Llama4ForCausalLM, float]:
    """Train a text model from scratch; return it with the seconds spent, those before a continuation included.

    Args:
        config: Shape of the model.
        tokenizer: Writes the training samples.
        recipe: Optimisation settings.
        workers: Processes, one CPU core each. The sample streams, and so the weights, depend on their number.
        state_path: When given, training is saved here at every progress report, and continued from here if it exists.
    """
    model = Llama4ForCausalLM(config.text_config).float()
    exchange = GradientExchange(workers, sum(parameter.numel() for parameter in model.parameters()))
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        mp.spawn(
            _work_grouped, args=(workers, exchange, scratch, config, tokenizer, recipe, state_path), nprocs=workers
        )
        result = torch.load(scratch / "result.pt", weights_only=True)
    model.load_state_dict(result["model"])
    return model.eval(), result["seconds"]
