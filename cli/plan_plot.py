"""A plan as a picture: memory by part at each precision, and tokens/s over batch. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cluster.plan_report import DeploymentPlan

SMALL = 0.004  # parts below this share of the total would not be seen; they are drawn as one


def draw(plan: DeploymentPlan, path: Path) -> None:
    """Writes the picture, in the format of the path's suffix. Raises OSError, or ValueError for an unknown suffix."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    memory, speed = figure.subplots(1, 2)
    figure.suptitle(f"{plan.model} on {plan.machine.title}")
    _draw_memory(plan, memory)
    _draw_speed(plan, speed)
    figure.savefig(path, dpi=120)


def _draw_memory(plan: DeploymentPlan, axes: Axes) -> None:
    precisions = list(plan.parameters.total_bytes)
    labels = [one.upper() for one in precisions]
    bottom = [0.0] * len(precisions)
    seen = [part for part in plan.parameters.parts if part.parameters >= SMALL * plan.parameters.total]
    stacked = {part.name: [part.bytes[one] / 1e9 for one in precisions] for part in seen}
    rest = [plan.parameters.total_bytes[one] / 1e9 for one in precisions]
    rest = [total - sum(heights[i] for heights in stacked.values()) for i, total in enumerate(rest)]
    for name, heights in (stacked | ({"other": rest} if len(seen) < len(plan.parameters.parts) else {})).items():
        axes.bar(labels, heights, bottom=bottom, label=name, width=0.6)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for label, height in zip(labels, bottom, strict=True):
        axes.annotate(f"{height:,.0f} GB", (label, height), ha="center", va="bottom")
    axes.axhline(plan.machine.memory / 1e9, color="grey", linestyle=":", label="memory of one device")
    axes.set(title="Weights", ylabel="GB", ymargin=0.1)
    axes.legend(fontsize="small")


def _draw_speed(plan: DeploymentPlan, axes: Axes) -> None:
    axes.set(title=f"Decoding at most, {plan.context:,} tokens each", xlabel="batch", ylabel="tokens/s")
    steps = plan.speed.decode
    if not steps:
        axes.text(0.5, 0.5, plan.misfit or "", ha="center", va="center", wrap=True, transform=axes.transAxes)
        return
    axes.loglog([step.batch for step in steps], [step.tokens_per_s for step in steps], linestyle=":", color="C0")
    fitting = [step for step in steps if step.fits]
    axes.loglog(
        [step.batch for step in fitting],
        [step.tokens_per_s for step in fitting],
        marker="o",
        color="C0",
        label="tokens/s (dotted: KV does not fit)",
    )
    if bound := plan.speed.compute_bound_batch:
        axes.axvline(bound, color="C3", linestyle="--", label=f"experts compute-bound: {bound:,}")
    axes.grid(which="both", alpha=0.3)
    axes.legend(fontsize="small")
