"""Progress of the work after training: a bar on a terminal, a line now and then elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["ProgressReport"]

SECONDS_BETWEEN_LINES = 5.0


class ProgressReport:
    """A context manager that is told ``(stage, done, total)``.

    Args:
        shown: False: say nothing (other ranks, ``enable_progress_bar=False``).
    """

    def __init__(self, shown: bool):
        console = Console()
        self._bar: Progress | None = None
        self._lines = shown and not console.is_terminal
        self._stages: dict[str, Any] = {}
        self._last = time.monotonic()
        if shown and console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=console)      # a console of its own: Lightning's bar may be live

    def __enter__(self) -> "ProgressReport":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._bar is not None:
            if stage not in self._stages:
                self._stages[stage] = self._bar.add_task(stage, total=total or None)
            self._bar.update(self._stages[stage], completed=done, total=total or None)
        elif self._lines and time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            print(f"{stage}: {done}/{total}" if total else f"{stage}: {done}", flush=True)
