"""A modifier: one compression technique with its arguments, its window in time, and its handlers.

It keeps the names that llm-compressor documents, so that a modifier written for it runs here, and mends its clock.
Arguments are the annotated fields of the class (pydantic validates them and refuses unknown ones); run-time state is
private: names that begin with an underscore.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, PrivateAttr, field_validator, model_validator
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_compress.core.events import Event, EventType, Unit
from lightning_compress.core.state import State

__all__ = ["Modifier", "ModifierInterface"]


class ModifierInterface(ABC):
    """What the lifecycle asks of a modifier."""

    @property
    @abstractmethod
    def initialized(self) -> bool:
        """True once :meth:`initialize` succeeded."""

    @property
    @abstractmethod
    def finalized(self) -> bool:
        """True once :meth:`finalize` succeeded."""

    @abstractmethod
    def initialize(self, state: State, **kwargs: Any) -> None:
        """Prepare the model."""

    @abstractmethod
    def finalize(self, state: State, **kwargs: Any) -> None:
        """Clean up; the model is as it shall be saved."""

    @abstractmethod
    def update_event(self, state: State, event: Event, **kwargs: Any) -> None:
        """Act on an event."""


class Modifier(ModifierInterface, BaseModel):
    """Base class of all modifiers: subclass it, implement :meth:`on_initialize` and the handlers you need.

    Args:
        index: Place in the recipe; free for the user.
        group: Name of the group in the recipe; free for the user.
        start: When the modifier starts, in ``unit``; None: it never starts by itself (post-training techniques).
        end: When it ends, in ``unit``; None: never.
        update: How often :meth:`on_update` runs, in ``unit``; None: at every event.
        unit: ``step`` (optimizer steps), ``epoch`` or ``fraction`` (of the whole run).
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, validate_default=True)

    needs_calibration: ClassVar[bool] = False
    """True when it acts on calibration events (CALIBRATION_START, BLOCK_END, ...)."""
    one_pass: ClassVar[bool] = False
    """True when each hooked module can be finished alone, at MODULE_READY (see calibration/)."""
    own_pass: ClassVar[bool] = False
    """True when later modifiers must see the block as this one leaves it: it gets a pass over the inputs for itself."""

    index: int | None = None
    group: str | None = None
    start: float | None = None
    end: float | None = None
    update: float | None = None
    unit: Unit = "step"

    _initialized: bool = PrivateAttr(default=False)
    _finalized: bool = PrivateAttr(default=False)
    _started: bool = PrivateAttr(default=False)
    _ended: bool = PrivateAttr(default=False)
    _updates: int = PrivateAttr(default=0)                     # update points already delivered
    _paused: int = PrivateAttr(default=0)
    _token_mask: Tensor | None = PrivateAttr(default=None)
    _hooks: list[tuple[nn.Module, RemovableHandle]] = PrivateAttr(default_factory=list)

    @field_validator("update")
    @classmethod
    def _update_is_positive(cls, update: float | None) -> float | None:
        if update is not None and update <= 0:
            raise ValueError(f"update={update} must be positive; leave it out to be called at every event")
        return update

    @model_validator(mode="after")
    def _window_is_ordered(self) -> "Modifier":
        if self.start is not None and self.end is not None and self.end < self.start:
            raise ValueError(f"end={self.end} lies before start={self.start} (unit: {self.unit})")
        return self

    @property
    def name(self) -> str:
        """The name for messages and checkpoints: the class, and its group when it has one."""
        return f"{type(self).__name__}[{self.group}]" if self.group else type(self).__name__

    @property
    def needs_data(self) -> bool:
        """True when it cannot work without calibration batches (a question of its arguments)."""
        return False

    @property
    def initialized(self) -> bool:
        return self._initialized

    @property
    def finalized(self) -> bool:
        return self._finalized

    # -- the life of a modifier ---------------------------------------------------------------------------------------

    def initialize(self, state: State, event: Event | None = None, **kwargs: Any) -> None:
        """Run :meth:`on_initialize`, then start if the window begins at index 0.

        Raises:
            RuntimeError: It is initialized or finalized already, or ``on_initialize`` returned False.
        """
        if self._finalized:
            raise RuntimeError(f"cannot initialize {self.name}: it is finalized; make a new one")
        if self._initialized:
            raise RuntimeError(f"cannot initialize {self.name} twice")
        try:
            done = self.on_initialize(state, **kwargs)
        except BaseException:
            self.remove_hooks()
            raise
        if not done:
            self.remove_hooks()
            raise RuntimeError(
                f"{self.name}.on_initialize returned {done!r}, expected True: it could not prepare the model, "
                f"and nothing of it stays attached; check its arguments"
            )
        self._initialized = True
        event = (event or Event(EventType.BATCH_START)).in_unit(self.unit)
        if event.global_step == 0 and self.start is not None and self.start <= 0 and self.should_start(event):
            self._start(state, event, **kwargs)

    def finalize(self, state: State, **kwargs: Any) -> None:
        """Run :meth:`on_finalize` and take all hooks off.

        Raises:
            RuntimeError: It was finalized before, never initialized, or ``on_finalize`` returned False.
        """
        if self._finalized:
            raise RuntimeError(f"cannot finalize {self.name} twice")
        if not self._initialized:
            raise RuntimeError(f"cannot finalize {self.name}: it was never initialized")
        done = self.on_finalize(state, **kwargs)
        self.remove_hooks()
        if not done:
            raise RuntimeError(f"{self.name}.on_finalize returned {done!r}, expected True")
        self._finalized = True

    def update_event(self, state: State, event: Event, **kwargs: Any) -> None:
        """Hand an event to the handlers, in the order of the table in docs/index.md.

        Raises:
            RuntimeError: It is not initialized, or finalized.
        """
        if not self._initialized:
            raise RuntimeError(f"{self.name} got {event.type_} before it was initialized")
        if self._finalized:
            raise RuntimeError(f"{self.name} got {event.type_} after it was finalized")
        event = event.in_unit(self.unit)
        self.on_event(state, event, **kwargs)
        if (calibrate := self._calibration_handlers().get(event.type_)) is not None:
            calibrate(state, event, **kwargs)
        elif event.type_ == EventType.BATCH_START and not self._started and self.should_start(event):
            self._start(state, event, **kwargs)
            self.on_update(state, event, **kwargs)
        elif event.type_ == EventType.BATCH_END and self._started and not self._ended and self.should_end(event):
            self.on_end(state, event, **kwargs)
            self._ended = True
            self.on_update(state, event, **kwargs)
        elif self._started and not self._ended and self._is_due(event):
            self.on_update(state, event, **kwargs)

    def _start(self, state: State, event: Event, **kwargs: Any) -> None:
        self.on_start(state, event, **kwargs)
        self._started = True
        if self.update and self.start is not None:
            self._updates = event.due_count(self.start, self.update)

    def _is_due(self, event: Event) -> bool:
        """Without ``update``: always. With it: once at the first BATCH_START at or after each update point."""
        if self.update is None:
            return True
        if event.type_ != EventType.BATCH_START or self.start is None:
            return False
        due = event.due_count(self.start, self.update)
        missed, self._updates = due > self._updates, max(due, self._updates)
        return missed

    def _calibration_handlers(self) -> dict[EventType | None, Callable[..., None]]:
        return {
            EventType.CALIBRATION_START: self.on_calibration_start,
            EventType.MODULE_READY: self.on_module_ready,
            EventType.BLOCK_END: self.on_block_end,
            EventType.CALIBRATION_END: self.on_calibration_end,
        }

    def should_start(self, event: Event) -> bool:
        """``start <= index`` and the window is not over; False when ``start`` is None."""
        index = event.in_unit(self.unit).current_index if self.start is not None else 0
        return self.start is not None and self.start <= index and (self.end is None or index < self.end)

    def should_end(self, event: Event) -> bool:
        """``index >= end``; False when ``end`` is None."""
        return self.end is not None and event.in_unit(self.unit).current_index >= self.end

    # -- handlers: override what you need -----------------------------------------------------------------------------

    @abstractmethod
    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Prepare the model before optimizers exist. Return True, or False when it cannot be done."""

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Clean up. Return True."""
        return True

    def on_event(self, state: State, event: Event, **kwargs: Any) -> None:
        """Called first, at every event."""

    def on_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Called once, when the window opens."""

    def on_update(self, state: State, event: Event, **kwargs: Any) -> None:
        """Called inside the window: at every event, or with ``update`` once per update point, at BATCH_START."""

    def on_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Called once, when the window closes; never without a start."""

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Hook the targets (:meth:`hook`)."""

    def on_module_ready(self, state: State, event: Event, **kwargs: Any) -> None:
        """One-pass walk: ``state.modules`` have seen all their inputs; finish them now."""

    def on_block_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """``state.block`` has seen all its inputs; finish what is left of ``state.modules``."""

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Name the targets that never saw data; drop statistics."""

    # -- hooks ----------------------------------------------------------------------------------------------------------

    def hook(self, module: nn.Module, function: Callable[..., Any], kind: str = "forward_pre") -> RemovableHandle:
        """Call ``function`` at every forward of ``module`` until :meth:`remove_hooks`, except while paused.

        Args:
            module: Where the hook goes.
            function: ``(module, args)`` for ``forward_pre``, ``(module, args, output)`` for ``forward``; what it returns
                replaces the input or the output, as in torch.
            kind: ``forward_pre`` or ``forward``.
        """

        def unless_paused(*args: Any) -> Any:
            return None if self._paused else function(*args)

        handle: RemovableHandle = getattr(module, f"register_{kind}_hook")(unless_paused)
        self._hooks.append((module, handle))
        return handle

    @property
    def hooked(self) -> list[nn.Module]:
        """Modules that carry a hook of this modifier, each once, in the order of hooking."""
        return list(dict.fromkeys(module for module, _ in self._hooks))

    @property
    def token_mask(self) -> Tensor | None:
        """While a calibration batch runs: True for tokens that count (not padding), bool [batch, tokens], or None."""
        return self._token_mask

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hooks do nothing inside; nests."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def remove_hooks(self, *modules: nn.Module) -> None:
        """Take off the hooks of some modules, or all of them."""
        keep = []
        for module, handle in self._hooks:
            if modules and not any(module is m for m in modules):
                keep.append((module, handle))
            else:
                handle.remove()
        self._hooks = keep

    # -- checkpoints ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Primitives and tensors only. Subclasses add to what ``super().state_dict()`` returns."""
        return {"started": self._started, "ended": self._ended, "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        self._started, self._ended, self._updates = state["started"], state["ended"], state["updates"]
