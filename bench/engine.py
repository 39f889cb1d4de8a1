"""Decode and prefill of the whole engine, against what this machine could do at best and against transformers."""

from __future__ import annotations

import statistics
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.bounds import Bound, Costs
from bench.common import DEFAULT_CHECKPOINT, Cell, CheckpointDir, JsonFile, Report, Threads, spread
from bench.distributed_engine import DistributedEngine, Roles, Transport, hidden_share
from bench.limits import Limits, MovingLimits
from bench.local_engine import DecodeRun, LocalEngine, Shape, single_process
from llama4.config import TextConfig

PARTS = ("decode", "prefill", "context", "transformers", "distributed")
BATCHES = (1, 16, 64)
PREFILLS = (128, 2048)
CONTEXT_BATCHES = (1, 4)
CONTEXTS = (128, 1024, 4096, 8160, 16352, 32736)  # the last ones end just before a chunk does
SHAPE = Shape()
Row = dict[str, Cell]


def decode_row(run: DecodeRun, costs: Costs, limits: Limits) -> Row:
    """`% of bound`: the bound's time to the measured one, from the experts that were really hit."""
    hits = run.parts["experts_hit"]
    bound = Bound.of(limits, nbytes=costs.weight_bytes(hits), flops=costs.flops(run.batch, run.batch))
    return {
        "batch": str(run.batch),
        "tokens/s": run.batch / run.median,
        "ms/step": run.median * 1e3,
        "+-%": spread(run.seconds) * 100,
        "experts hit/layer": hits / len(costs.config.moe_layers),
        "weights MB": costs.weight_bytes(hits) / 1e6,
        "bound ms": bound.seconds * 1e3,
        "bound by": bound.by,
        "% of bound": 100 * bound.seconds / run.median,
        **_beside(limits),
    }


def _beside(limits: Limits) -> Row:
    return {"limits: read GB/s": limits.bandwidth / 1e9, "GEMM GFLOP/s": limits.gemm / 1e9}


def around_row(run: DecodeRun) -> Row:
    """Where a step's time goes; `around` is all that is neither network nor sampler."""
    parts, step = run.parts, run.mean
    around = step - parts["decoder"] - parts["head"] - parts["sample"]
    return {
        "batch": str(run.batch),
        "network ms": (parts["decoder"] - parts["plan"]) * 1e3,
        "head ms": parts["head"] * 1e3,
        "sampler ms": parts["sample"] * 1e3,
        "plan ms": parts["plan"] * 1e3,
        "around ms": around * 1e3,
        "plan + around %": 100 * (around + parts["plan"]) / step,
        "with sampler %": 100 * (around + parts["plan"] + parts["sample"]) / step,
    }


def prefill_row(tokens: int, found: list[float], costs: Costs, limits: Limits) -> Row:
    taken = statistics.median(found)
    flops = costs.flops(tokens, 1, [costs.keys(position) for position in range(tokens)])
    weights = costs.weight_bytes(len(costs.config.moe_layers) * costs.config.num_local_experts)
    bound = Bound.of(limits, nbytes=weights, flops=flops)
    return {
        "prompt": str(tokens),
        "tokens/s": tokens / taken,
        "ms": taken * 1e3,
        "+-%": spread(found) * 100,
        "GFLOP/s": flops / taken / 1e9,
        "% of GEMM rate": 100 * flops / taken / limits.gemm,
        "bound by": bound.by,
        "% of bound": 100 * bound.seconds / taken,
        **_beside(limits),
    }


def context_runs(engine: LocalEngine, batch: int, steps: int) -> dict[int, DecodeRun]:
    """At each context that the page pools have room for."""
    contexts = [context for context in CONTEXTS if batch * (context + 2 * steps) <= SHAPE.kv_tokens]
    return {context: engine.decode(batch, context, steps) for context in contexts}


def context_rows(runs: dict[int, DecodeRun], costs: Costs, limits: Limits, steps: int) -> list[Row]:
    """`extra` is what a step takes, or reads, more than at the first context; `% of read` is its part of the limit."""
    rows: list[Row] = []
    first: tuple[float, int] | None = None
    for context, run in runs.items():
        read = run.batch * costs.kv_bytes(context + steps // 2)
        first = first or (run.median, read)
        extra_s, extra_bytes = run.median - first[0], read - first[1]
        nbytes = costs.weight_bytes(run.parts["experts_hit"])
        rate = extra_bytes / extra_s if extra_s > 0 and extra_bytes else None
        rows.append(
            {
                "batch": str(run.batch),
                "context": str(context),
                "ms/step": run.median * 1e3,
                "KV MB": read / 1e6,
                "time x": run.median / first[0],
                "bytes read x": (nbytes + read) / (nbytes + first[1]),
                "extra ms": extra_s * 1e3,
                "extra KV GB/s": rate / 1e9 if rate else None,
                "% of read": 100 * rate / limits.bandwidth if rate else None,
            }
        )
    return rows


def transformers_rows(checkpoint: Path, ours: dict[str, float], context: int, steps: int, repeats: int) -> list[Row]:
    from bench.reference_engine import Reference

    reference = Reference(checkpoint)
    theirs = {f"decode {batch}": reference.decode(batch, context, steps) for batch in BATCHES}
    theirs |= {f"prefill {tokens}": reference.prefill(tokens, repeats) for tokens in PREFILLS}
    return [
        {
            "what": what,
            "transformers ms": taken * 1e3,
            "herder ms": ours[what] * 1e3 if what in ours else None,
            "times faster": taken / ours[what] if what in ours else None,
        }
        for what, taken in theirs.items()
    ]


def distributed_rows(local: LocalEngine, other: DistributedEngine, context: int, steps: int) -> list[Row]:
    """`of single process`: against the same decoding in one process, in turn; each a mean of its runs' medians."""
    rows: list[Row] = []
    for batch in BATCHES:
        turns: list[LocalEngine | DistributedEngine] = [local, other, local, other, local]
        runs = [engine.decode(batch, context, steps) for engine in turns]
        alone = statistics.fmean(run.median for run in runs[::2])
        taken = statistics.fmean(run.median for run in runs[1::2])
        run = runs[1]
        rows.append(
            {
                "batch": str(run.batch),
                "tokens/s": run.batch / taken,
                "ms/step": taken * 1e3,
                "+-%": spread(run.seconds) * 100,
                "dispatch ms": run.parts["dispatch"] * 1e3,
                "combine ms": run.parts["combine"] * 1e3,
                "hidden %": 100 * hidden_share(run),
                "single process ms": alone * 1e3,
                "of single process": alone / taken,
            }
        )
    return rows


def main(
    checkpoint: CheckpointDir = DEFAULT_CHECKPOINT,
    threads: Threads = 2,
    only: Annotated[list[str] | None, typer.Option(help=f"One or more of {', '.join(PARTS)}; default: all.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of each prompt before decoding.")] = 128,
    steps: Annotated[int, typer.Option(help="Decode steps that are timed.")] = 32,
    repeats: Annotated[int, typer.Option(help="Prefills that are timed.")] = 5,
    temperature: Annotated[float, typer.Option(help="Of decoding; 0 is greedy.")] = 0.0,
    attention_threads: Annotated[int, typer.Option(help="torch threads of the distributed run.")] = 2,
    expert_threads: Annotated[int, typer.Option(help="torch threads of the distributed run.")] = 2,
    json_file: JsonFile = None,
) -> None:
    """Measure the engine in one process and in two, and print how near to this machine's limits it comes."""
    parts = set(only or PARTS)
    if unknown := parts - set(PARTS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: must be of {', '.join(PARTS)}", param_hint="--only")
    torch.set_num_threads(threads)
    report = Report(f"engine, {checkpoint}")
    limits = MovingLimits(threads)
    costs = Costs(TextConfig.from_dir(checkpoint))
    ours: dict[str, float] = {}

    engine = single_process(checkpoint, SHAPE)
    if parts & {"decode", "transformers"}:
        runs = [limits.around(partial(engine.decode, batch, context, steps, temperature)) for batch in BATCHES]
        ours |= {f"decode {run.batch}": run.median for run, _ in runs}
        rows = [decode_row(run, costs, beside) for run, beside in runs]
        report.add("decode", rows, "medians; the bound counts weights only; limits: means of before and after")
        report.add("where a step goes", [around_row(run) for run, _ in runs], "means")
    if parts & {"prefill", "transformers"}:
        prefills = {tokens: limits.around(partial(engine.prefill, tokens, repeats)) for tokens in PREFILLS}
        ours |= {f"prefill {tokens}": statistics.median(taken) for tokens, (taken, _) in prefills.items()}
        rows = [prefill_row(tokens, taken, costs, beside) for tokens, (taken, beside) in prefills.items()]
        report.add("prefill", rows, "medians; limits: means of before and after")
    if "context" in parts:
        grown = [limits.around(partial(context_runs, engine, batch, steps)) for batch in CONTEXT_BATCHES]
        report.add(
            "growing context", [row for some, beside in grown for row in context_rows(some, costs, beside, steps)]
        )
    if "distributed" in parts:
        title = f"1 attention ({attention_threads} threads) + 1 expert process ({expert_threads} threads)"
        transports: tuple[Transport, ...] = ("p2p", "gloo")
        for transport in transports:
            roles = Roles(attention_threads, expert_threads)
            with closing(DistributedEngine(checkpoint, SHAPE, roles, transport)) as other:
                report.add(f"{title}, {transport}", distributed_rows(engine, other, context, steps))
    engine.close()
    del engine
    if "transformers" in parts:
        report.add("transformers", transformers_rows(checkpoint, ours, context, steps // 4, repeats // 2))
    report.save(json_file)


if __name__ == "__main__":
    typer.run(main)
