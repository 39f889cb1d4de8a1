"""How loading shows: a bar per actor in a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
from types import TracebackType

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

STEP = 4  # plain lines come at each quarter


class LoadProgress:
    """Call it as `progress(actor_name, done_bytes, total_bytes)`, from any thread."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._tasks: dict[str, TaskID] = {}
        self._told: dict[str, int] = {}
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> LoadProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, actor_name: str, done_bytes: int, total_bytes: int) -> None:
        with self._lock:
            if not self._console.is_terminal:
                self._line(actor_name, done_bytes, total_bytes)
                return
            if actor_name not in self._tasks:
                self._tasks[actor_name] = self._bars.add_task(actor_name, total=total_bytes)
            self._bars.update(self._tasks[actor_name], completed=done_bytes, total=total_bytes)

    def _line(self, name: str, done: int, total: int) -> None:
        quarter = done * STEP // total if total else 0
        if quarter > self._told.get(name, -1):
            self._told[name] = quarter
            self._console.print(f"{name}: loaded {decimal(done)} of {decimal(total)}", soft_wrap=True)
