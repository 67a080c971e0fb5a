"""A modifier that writes down what reaches it, and a way to send it whole batches."""

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import PrivateAttr

from lightning_compress.core import Event, EventType, Lifecycle, Modifier, State


class RecordingModifier(Modifier):
    """``calls`` holds (handler, event type, index), in order."""

    answer: Any = True
    _calls: list[tuple[str, str, float]] = PrivateAttr(default_factory=list)

    def note(self, handler: str, event: Event) -> None:
        self._calls.append((handler, event.type_.value, event.current_index))

    @property
    def handlers(self) -> list[str]:
        return [handler for handler, _, _ in self._calls]

    def indices(self, handler: str) -> list[float]:
        return [index for name, _, index in self._calls if name == handler]

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        self._calls.append(("initialize", "", 0))
        return self.answer

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        self._calls.append(("finalize", "", 0))
        return self.answer

    def on_start(self, state: State, event: Event, **kwargs: Any) -> None:
        self.note("start", event)

    def on_update(self, state: State, event: Event, **kwargs: Any) -> None:
        self.note("update", event)

    def on_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self.note("end", event)


@pytest.fixture
def recording() -> type[RecordingModifier]:
    return RecordingModifier


@pytest.fixture
def train() -> Callable[..., None]:
    """Sends the events of the training batches that make optimizer steps ``first`` to ``last`` (exclusive)."""

    def run(lifecycle: Lifecycle, first: int, last: int, accumulate: int = 1, **clock: Any) -> None:
        state = State()
        for step in range(first, last):
            for part in range(accumulate):
                at = {"global_step": step, "global_batch": step * accumulate + part, **clock}
                lifecycle.emit(state, Event(EventType.BATCH_START, **at))
                lifecycle.emit(state, Event(EventType.LOSS_CALCULATED, **at))
                if part == accumulate - 1:
                    lifecycle.emit(state, Event(EventType.OPTIM_PRE_STEP, **at))
                    at["global_step"] = step + 1
                    lifecycle.emit(state, Event(EventType.OPTIM_POST_STEP, **at))
                lifecycle.emit(state, Event(EventType.BATCH_END, **at))

    return run
