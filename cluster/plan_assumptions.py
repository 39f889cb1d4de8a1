"""What a plan takes for granted, in words."""

from __future__ import annotations

from collections.abc import Iterator

from cluster.plan_layout import RESERVE, Workload


def assumptions(work: Workload) -> Iterator[str]:
    """One sentence each, those that matter for this model, machine and precision only."""
    shape, precision, computes_in = work.shape, work.precision.upper(), work.machine.computes_in(work.precision).upper()
    quantised = work.precision not in ("fp32", "bf16")
    scales = "; the scales of quantised ones, some percent, are not counted" if quantised else ""
    yield f"All weights are {precision}{scales}. Rows and KV are {'FP32' if work.precision == 'fp32' else 'BF16'}."
    if computes_in != precision:
        yield f"The machine has no {precision} units: matrices are multiplied at its {computes_in} rate."
    if quantised:
        yield "Herder itself computes in FP32 and BF16; this shows what another precision would take."
    yield f"{RESERVE:.0%} of a device's memory is kept for rows in flight and the runtime."
    if shape.chunked_layers:
        yield f"A chunked layer counts as one whole chunk of {shape.chunk:,} tokens, or the context if that is shorter."
    if shape.vision_parameters:
        yield "The image encoder is part of the total, but not active for text, and its replicas are not placed."
    yield "Attention actors hold all weights but the routed experts', whole, and the KV of their own sequences."
    if shape.moe:
        yield "Experts are chosen evenly. A token's row travels to each expert that it chose, and back."
    yield "Decoding only. Phases of a step follow each other, each at the vendor's peak for bandwidth or arithmetic."
    yield "Launches, network latency and waiting are left out: the speeds are upper bounds, which no system reaches."
