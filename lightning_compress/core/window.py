"""The window of a modifier: from which point of training to which it acts, how often, and how far it has come."""

import warnings
from typing import Self

from pydantic import PrivateAttr, model_validator

from lightning_compress.core.arguments import Arguments
from lightning_compress.core.events import Event, EventType, Unit

__all__ = ["Window"]


class Window(Arguments):
    """A window of training, and what has happened in it.

    Args:
        start: When it opens, in ``unit``; None: never.
        end: When it closes, in ``unit``; None: never.
        update: Distance between update points, in ``unit``; None: every event is one.
        unit: ``step`` (optimizer steps), ``epoch`` or ``fraction`` (of the whole run).
    """

    start: float | None = None
    end: float | None = None
    update: float | None = None
    unit: Unit = "step"

    _started: bool = PrivateAttr(default=False)  # on_start ran in this process
    _resumed: bool = PrivateAttr(default=False)  # on_start ran in the run that this one continues
    _ended: bool = PrivateAttr(default=False)
    _over: bool = PrivateAttr(default=False)  # on_end ran in the run that this one continues
    _updates: int = PrivateAttr(default=0)  # update points already delivered

    @model_validator(mode="after")
    def _window_is_possible(self) -> Self:
        window = {"start": self.start, "end": self.end}
        late = ", ".join(f"{name}={value:g}" for name, value in window.items() if value is not None and value > 1)
        if late and self.unit == "fraction":
            raise ValueError(f"{late} lies after the end of the run, which is 1 in unit 'fraction'; 25 % is 0.25")
        if self.update is not None and self.update <= 0:
            raise ValueError(f"update={self.update} must be positive; leave it out to be called at every event")
        if self.start is not None and self.end is not None and self.end <= self.start:
            raise ValueError(
                f"end={self.end} must lie after start={self.start} (unit: {self.unit}); leave end out for no end"
            )
        if self.update and self.start is not None and self.end is not None and self.update > self.end - self.start:
            raise ValueError(
                f"update={self.update} is larger than the window from {self.start} to {self.end} (unit: {self.unit}), "
                f"so that nothing would change inside it; give at most {self.end - self.start:g}"
            )
        return self

    @property
    def resumed(self) -> bool:
        """True when the run continues a checkpoint in which the window had opened already.

        Hooks do not survive a process, so :meth:`on_start` runs again at the first batch. It puts them on, and asks
        here before it overwrites what :meth:`load_state_dict` or the model's own state brought back.
        """
        return self._resumed

    @property
    def is_open(self) -> bool:
        """True from the start to the end, in this process."""
        return self._started and not self._ended

    def should_start(self, event: Event) -> bool:
        """``start <= index`` and the window is not over; False when ``start`` is None."""
        index = event.in_unit(self.unit).current_index if self.start is not None else 0
        return self.start is not None and self.start <= index and (self.end is None or index < self.end)

    def should_end(self, event: Event) -> bool:
        """``index >= end``; False when ``end`` is None."""
        return self.end is not None and event.in_unit(self.unit).current_index >= self.end

    def check_length(self, event: Event) -> None:
        """Warn of a window that does not fit into the run, where its length is known; asked as training begins."""
        kind = "steps" if event.passed is None else "batches"  # of manual optimization; its steps are not known
        if self.start is None or event.total_steps is None or (kind == "batches" and self.unit == "step"):
            return
        length = event.total_steps / event.in_unit(self.unit).steps_per_unit
        counted = "" if self.unit == "step" else f", {length:g} in unit {self.unit!r}"
        if self.start >= length:
            problem = f"start={self.start:g} is not before the end of the run, so it will never start"
        elif self.end is not None and self.end > length:
            share = (length - self.start) / (self.end - self.start)
            problem = f"end={self.end:g} lies past the end of the run, which covers {share:.0%} of the window"
        else:
            return
        warnings.warn(f"{self.name}: {problem}: the run has {event.total_steps} {kind}{counted}", stacklevel=2)

    def _is_due(self, event: Event) -> bool:
        """Without ``update``: always. With it: once at the first BATCH_START at or after each update point."""
        if self.update is None or event.type_ != EventType.BATCH_START:
            return self.update is None
        due, delivered = event.due_count(self.start or 0.0, self.update), self._updates
        self._updates = max(due, delivered)
        return due > delivered
