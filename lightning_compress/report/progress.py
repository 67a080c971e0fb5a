"""Progress of the work after training: one bar on a terminal, a line now and then elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

__all__ = ["ProgressReport"]

SECONDS_BETWEEN_LINES = 5.0
REDRAWS_PER_SECOND = 4  # one redraw takes about 1 ms of CPU time, whatever the number of updates
HOUR = 3600.0


class ProgressReport:
    """A context manager that shows ``(phase, done, total, detail)``.

    A terminal shows one bar, whose text changes and which disappears at the end; a file or pipe gets a line at most
    every five seconds. Both say how much time is left, estimated from the blocks or batches of the phase that are done.

    Args:
        shown: False: show nothing (other ranks, ``enable_progress_bar=False``).
        console: Where to; by default the standard output.
        clock: Seconds, for tests.
    """

    def __init__(
        self, shown: bool, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        console = console or Console()
        self._clock = clock
        self._print = console.file if shown and not console.is_terminal else None
        self._bar = _bar(console) if shown and console.is_terminal else None
        self._phase: str | None = None
        self._began = self._last = clock()
        self._entered = ExitStack()

    def __enter__(self) -> "ProgressReport":
        if self._bar is not None:
            self._entered.enter_context(_log_lines_above(self._bar))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.close()

    def __call__(self, phase: str, done: int, total: int, detail: str = "") -> None:
        """Show where the work is.

        Args:
            phase: What is being done, such as ``calibration``; a new phase starts the bar and its clock anew.
            done: Blocks or batches of the phase that are done.
            total: Of how many; 0 where that is unknown.
            detail: What is being done inside the current block, such as the module and the batch.
        """
        text = f"{phase}: {detail}" if detail else phase
        if self._bar is not None:
            if phase != self._phase:
                self._restart_bar(total)
            self._bar.update(self._bar.task_ids[0], description=text, completed=done, total=total or None)
        elif self._print is not None:
            if phase != self._phase:
                self._began = self._clock()
            if self._clock() - self._last >= SECONDS_BETWEEN_LINES:
                self._last = self._clock()
                share = f"{done}/{total}" if total else str(done)
                print(f"{text}: {share}{self._time_left(done, total)}", file=self._print, flush=True)
        self._phase = phase

    def _restart_bar(self, total: int) -> None:
        assert self._bar is not None
        if self._bar.task_ids:
            self._bar.remove_task(self._bar.task_ids[0])
        self._bar.add_task("", total=total or None)

    def _time_left(self, done: int, total: int) -> str:
        if not 0 < done < total:
            return ""
        seconds = round((self._clock() - self._began) / done * (total - done))
        return f", {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"


@contextmanager
def _log_lines_above(bar: Progress) -> Iterator[None]:
    """Show the bar; what log handlers write to the terminal meanwhile goes above it, as rich does for ``print``.

    A handler keeps the stream of its making, past rich's. Its line would go behind the bar, which then stays.
    """
    moved: list[tuple[logging.StreamHandler[Any], Any]] = []
    loggers = [logging.root, *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger))]
    with bar:
        for handler in {handler for logger in loggers for handler in logger.handlers}:
            if isinstance(handler, logging.StreamHandler) and _is_terminal(handler.stream):
                moved.append((handler, handler.setStream(sys.stdout)))
        try:
            yield
        finally:
            for handler, stream in moved:
                handler.setStream(stream)


def _is_terminal(stream: Any) -> bool:
    return bool(getattr(stream, "isatty", lambda: False)())


def _bar(console: Console) -> Progress:
    """One row that fits the width of the terminal: the text gives way, the figures do not."""
    return Progress(
        TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        redirect_stderr=_is_terminal(sys.stderr),  # a file of errors keeps its lines
        refresh_per_second=REDRAWS_PER_SECOND,
        speed_estimate_period=HOUR,  # a block may take longer than rich's default window of 30 s
        transient=True,
        expand=True,
    )
