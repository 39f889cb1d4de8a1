"""What the benchmarks share: repeated timing, tables on the terminal, the same figures as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeAlias, TypeVar

import torch
import typer
from rich.console import Console
from rich.table import Table

Result = TypeVar("Result")
Cell: TypeAlias = str | int | float | None
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file as well.")]
Threads = Annotated[int, typer.Option(min=1, help="torch threads.")]
CheckpointDir = Annotated[
    Path, typer.Option("--checkpoint", file_okay=False, exists=True, help="Made by bench.make_checkpoint.")
]
DEFAULT_CHECKPOINT = Path(".bench/checkpoint")


def seconds(work: Callable[[], object], repeats: int, warmup: int = 1) -> list[float]:
    """How long `work` takes, each time."""
    for _ in range(warmup):
        work()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return found


def apart(work: Callable[[], Result]) -> Result:
    """The result of `work`, done on a thread that ends with it.

    OpenMP keeps threads for each thread that has computed, and lets all of them sleep sooner once there are more than
    cores: the engine's thread decoded a sixth more slowly beside one that had only loaded weights.
    """
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(work).result()


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation; NaN of nothing."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles, as a fraction of the median: how noisy a measurement was."""
    return (percentile(values, 75) - percentile(values, 25)) / 2 / statistics.median(values)


def machine() -> dict[str, Cell]:
    """What the figures were measured on, and how busy it was."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model n")]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
    }


@dataclass
class Report:
    """Tables that are printed as they come, and can be saved together."""

    title: str
    console: Console = field(default_factory=lambda: Console(width=None if Console().is_terminal else 140))
    sections: dict[str, list[dict[str, Cell]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.machine = machine()
        about = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        self.console.print(f"[bold]{self.title}[/bold]  {about}", highlight=False)

    def add(self, title: str, rows: Sequence[Mapping[str, Cell]], note: str = "") -> None:
        """A table: one line for each mapping, a column for each key."""
        self.sections[title] = [dict(row) for row in rows]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        table = Table(title=title, title_justify="left", caption=note or None, caption_justify="left")
        for number, name in enumerate(columns):
            table.add_column(name, justify="left" if number == 0 else "right")
        for row in rows:
            table.add_row(*(_text(row.get(name)) for name in columns))
        self.console.print(table)

    def save(self, file: Path | None) -> None:
        if file is not None:
            found = {"title": self.title, "machine": self.machine, "sections": self.sections}
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _text(value: Cell) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else value
