"""Which of a deployment's processes use the CPU: the model's actors, the gateway, Ray itself. On this machine only."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import psutil

from bench.common import Cell

# The start of a process's title, or a part of its command line, and what it belongs to; the first match counts.
# Ray gives its workers' processes titles such as ray::AttentionActor or ray::ServeReplica:herder:Gateway.
_ACTORS = (
    ("ray::AttentionActor", "attention"),
    ("ray::attention", "attention"),
    ("ray::ExpertActor", "experts"),
    ("ray::expert", "experts"),
    ("ray::ServeReplica:herder", "gateway"),
    ("ray::ProxyActor", "gateway"),
)
_RAY = ("ray::", "raylet", "gcs_server", "/ray/dashboard/", "/ray/_private/", "/ray/core/", "ray.util.client")
MODEL = ("attention", "experts")


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """CPU seconds by process."""

    by_process: dict[tuple[int, float], tuple[str, float]]

    @classmethod
    def now(cls) -> CpuTimes:
        found = {}
        for process in psutil.process_iter(["pid", "create_time", "cmdline", "cpu_times"]):
            info = process.info
            group = _group(info["cmdline"] or [])
            if group is not None and info["cpu_times"] is not None:
                times = info["cpu_times"]
                found[info["pid"], info["create_time"]] = (group, times.user + times.system)
        return cls(found)

    def since(self, before: CpuTimes) -> dict[str, float]:
        """CPU seconds used since `before`, by group."""
        used: dict[str, float] = defaultdict(float)
        for process, (group, seconds) in self.by_process.items():
            used[group] += seconds - before.by_process.get(process, (group, 0.0))[1]
        return dict(used)


def _group(command: list[str]) -> str | None:
    line = " ".join(command)
    for start, group in _ACTORS:
        if line.startswith(start):
            return group
    return "ray" if any(part in line for part in _RAY) else None


def share_rows(used: dict[str, float], elapsed: float) -> list[dict[str, Cell]]:
    """A line for each group; the last one is all that is not the model."""
    total = sum(used.values()) or float("nan")
    rows: list[dict[str, Cell]] = [
        {"processes": group, "CPU s": seconds, "cores": seconds / elapsed, "% of the run": 100 * seconds / total}
        for group, seconds in sorted(used.items())
    ]
    rest = sum(seconds for group, seconds in used.items() if group not in MODEL)
    rows.append(
        {
            "processes": "gateway + ray",
            "CPU s": rest,
            "cores": rest / elapsed,
            "% of the run": 100 * rest / total,
        }
    )
    return rows
