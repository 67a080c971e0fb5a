"""A modifier: one compression technique with its arguments, its window in time, and its handlers.

It keeps the names that llm-compressor documents, so that a modifier written for it runs here, with a clock that counts.
Arguments are the annotated fields of the class (arguments.py), the window is in window.py, hooks are in hooks.py;
run-time state is private: names that begin with an underscore.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

from pydantic import PrivateAttr, model_validator
from torch import Tensor, nn

from lightning_compress.core.events import Event, EventType
from lightning_compress.core.hooks import Hooks
from lightning_compress.core.needs import OLD_NAMES, Needs, refuse_old_names
from lightning_compress.core.state import State
from lightning_compress.core.window import Window

__all__ = ["Modifier", "ModifierInterface"]

_AFTER_TRAINING = {
    EventType.TRAINING_END: "on_training_end",
    EventType.CALIBRATION_START: "on_calibration_start",
    EventType.BLOCK_SURVEYED: "on_block_surveyed",
    EventType.MODULE_READY: "on_module_ready",
    EventType.BLOCK_END: "on_block_end",
    EventType.CALIBRATION_END: "on_calibration_end",
}


class ModifierInterface(ABC):
    """The part of a modifier that the lifecycle calls."""

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
        """Clean up; afterwards the model is ready to be saved."""

    @abstractmethod
    def update_event(self, state: State, event: Event, **kwargs: Any) -> None:
        """Act on an event."""


class Modifier(ModifierInterface, Hooks, Window):
    """Base class of all modifiers: subclass it, implement :meth:`on_initialize` and the handlers you need.

    Args:
        index: Place in the recipe; free for the user.
        group: Name of the group in the recipe; free for the user.
        start: When the window opens, in ``unit``; None: never (post-training techniques).
        end: When it closes, in ``unit``; None: never.
        update: How often :meth:`on_update` runs, in ``unit``; None: at every event.
        unit: ``step`` (optimizer steps), ``epoch`` or ``fraction`` (of the whole run).

    Raises:
        ValueError: An argument is unknown (near misses are named) or has a value that it cannot have.
    """

    _initialized: bool = PrivateAttr(default=False)
    _finalized: bool = PrivateAttr(default=False)
    _handed_over: bool = PrivateAttr(default=False)
    _warned: set[str] = PrivateAttr(default_factory=set)  # texts of the warnings of set-up

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        refuse_old_names(cls.__name__, [*vars(cls), *cls.model_fields])
        if "needs" in cls.model_fields:
            raise ValueError(f"{cls.__name__}: needs is not an argument; write needs: ClassVar[Needs] = Needs(...)")

    @model_validator(mode="after")
    def _window_is_used(self) -> Self:
        arguments = {n: getattr(self, n) for n in ("start", "end", "update") if getattr(self, n) is not None}
        if arguments and not _has_window(self):
            named = ", ".join(f"{name}={value:g}" for name, value in arguments.items())
            raise ValueError(
                f"{named} would do nothing: {self.name} acts after training, on the final weights; leave it out"
            )
        return self

    @property
    def needs(self) -> Needs:
        """What the modifier needs from a run; a class declares ``needs = Needs(...)`` or overrides this property."""
        return Needs()

    @property
    def handles_training_end(self) -> bool:
        """True when the class has a handler for TRAINING_END."""
        return _overrides(self, "on_training_end")

    @property
    def unread_by(self) -> tuple[str, ...]:
        """Loaders that ignore what it leaves beside the weights: ``transformers``, ``vLLM``."""
        return ()

    @property
    def acts_after_training(self) -> bool:
        """True when the modifier works on the model after training, with calibration or without."""
        return self.needs.calibration or self.handles_training_end

    @property
    def handed_over(self) -> bool:
        """With ``needs.hand_over``: True once the calibration at ``start`` is done."""
        return self._handed_over

    def note_handed_over(self) -> None:
        """Called when the calibration at ``start`` is over."""
        self._handed_over = self.needs.hand_over

    @property
    def initialized(self) -> bool:
        return self._initialized

    @property
    def finalized(self) -> bool:
        return self._finalized

    # -- the life of a modifier --------------------------------------------------------------------------------------

    def initialize(self, state: State, event: Event | None = None, **kwargs: Any) -> None:
        """Run :meth:`on_initialize`, then start if the window begins at index 0. On failure hooks are removed.

        Raises:
            RuntimeError: The modifier is initialized or finalized already, or ``on_initialize`` returned False.
        """
        if self._finalized:
            raise RuntimeError(f"cannot initialize {self.name}: it is finalized; create a new one")
        if self._initialized:
            raise RuntimeError(f"cannot initialize {self.name} twice; create a new one")
        try:
            with _each_warning_once(self._warned):
                prepared = self.on_initialize(state, **kwargs)
            if not prepared:
                raise RuntimeError(
                    f"{self.name}.on_initialize returned {prepared!r}, expected True: it could not prepare the model, "
                    f"and its hooks are removed; check its arguments"
                )
            self._initialized = True
            event = (event or Event(EventType.BATCH_START)).in_unit(self.unit)
            if event.global_step == 0 and self.should_start(event):
                self._start(state, event, **kwargs)
        except BaseException:
            self._initialized = False
            self.remove_hooks()
            raise

    def finalize(self, state: State, **kwargs: Any) -> None:
        """Run :meth:`on_finalize`; all hooks are removed, also on failure. Warns when the window never opened.

        Raises:
            RuntimeError: The modifier was finalized before, never initialized, or ``on_finalize`` returned False.
        """
        if self._finalized:
            raise RuntimeError(f"cannot finalize {self.name} twice")
        if not self._initialized:
            raise RuntimeError(f"cannot finalize {self.name}: it was never initialized")
        try:
            succeeded = self.on_finalize(state, **kwargs)
        finally:
            self.remove_hooks()
        if not succeeded:
            raise RuntimeError(f"{self.name}.on_finalize returned {succeeded!r}, expected True")
        self._finalized = True
        if self.start is not None and not (self._started or self._resumed):
            until = "" if self.end is None else f" and before {self.end}"
            warnings.warn(
                f"{self.name} never started: no training batch began at or after {self.start}{until} "
                f"(unit: {self.unit}); check start, end and unit against the length of the run",
                stacklevel=2,
            )

    def update_event(self, state: State, event: Event, **kwargs: Any) -> None:
        """Hand an event to the handlers, in the order of the table in docs/index.md.

        Raises:
            RuntimeError: The modifier is not initialized, or it is finalized.
        """
        if not self._initialized:
            raise RuntimeError(f"{self.name} got {event.type_} before it was initialized")
        if self._finalized:
            raise RuntimeError(f"{self.name} got {event.type_} after it was finalized")
        event = event.in_unit(self.unit)
        self.on_event(state, event, **kwargs)
        if event.type_ in (EventType.TRAINING_END, EventType.CALIBRATION_START):  # names targets again, as set-up did
            with _each_warning_once(self._warned):
                getattr(self, _AFTER_TRAINING[event.type_])(state, event, **kwargs)
            return
        if event.type_ in _AFTER_TRAINING:
            getattr(self, _AFTER_TRAINING[event.type_])(state, event, **kwargs)
            return
        if event.type_ == EventType.BATCH_START and not (self._started or self._ended) and self.should_start(event):
            self._start(state, event, **kwargs)
        elif event.type_ == EventType.BATCH_END and self.is_open and self.should_end(event):
            self.on_end(state, event, **kwargs)
            self._ended = True
            self.on_update(state, event, **kwargs)
        elif event.type_ == EventType.BATCH_START and self.is_open and self._resumed and self.should_end(event):
            self.on_end(state, event, **kwargs)  # resumed past the end: undo on_start
            self._ended = True
        if self.is_open and self._is_due(event):
            self.on_update(state, event, **kwargs)

    def _start(self, state: State, event: Event, **kwargs: Any) -> None:
        self.on_start(state, event, **kwargs)
        self._started = True

    @property
    def acting(self) -> bool:
        """True when events of a batch can reach a handler: the window is open, or the class overrides that decision."""
        return self.is_open or _overrides(self, "on_event", "update_event", "should_start")

    # -- handlers: override what you need ----------------------------------------------------------------------------

    @abstractmethod
    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Prepare the model before optimizers exist. Return True, or False on failure."""

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

    def on_training_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Called once, after training and before calibration, also when no training took place; on rank zero.

        The place for work on the final weights that needs no calibration data. The model is in eval mode, without
        gradients, and its weights are finite.
        """

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Hook the targets (:meth:`hook`)."""

    def on_block_surveyed(self, state: State, event: Event, **kwargs: Any) -> None:
        """With ``needs.survey``: the dense ``state.modules`` have seen all inputs; set the hooks for the walk."""

    def on_module_ready(self, state: State, event: Event, **kwargs: Any) -> None:
        """One-pass walk: ``state.modules`` have seen all their inputs; finish them now."""

    def on_block_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """``state.block`` has seen all its inputs; finish what is left of ``state.modules``."""

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Name the targets that never saw data; drop statistics."""

    def group_state(self, modules: Mapping[str, nn.Module]) -> dict[str, Any] | None:
        """What it knows of a finished group, beside what the modules hold: a log keeps it. JSON types.

        Such as names of finished modules, or sums for CALIBRATION_END. None, as here for a modifier that calibrates:
        its calibration cannot go on after a kill, and a log is refused.
        """
        return None if self.needs.calibration else {}

    def load_group_state(self, modules: Mapping[str, nn.Module], state: dict[str, Any]) -> None:
        """A run goes on: these modules hold the results of an earlier one, where :meth:`group_state` gave ``state``.

        Forget them, as after BLOCK_END.
        """

    def survey_state(self) -> dict[str, Tensor] | None:
        """With ``needs.survey``: its statistics, before BLOCK_SURVEYED. None: a run that goes on surveys again for it.

        Where several processes calibrate together, tensors of one name must add up; those of single batches have the
        number of the batch in their names.
        """
        return None

    def load_survey_state(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`survey_state` gave, in place of a survey.

        Each process gets the sums over all, of a run that may have had another number of them.
        """

    def on_weights_loaded(self, state: dict[str, Any]) -> None:
        """The weights of an earlier checkpoint (the best one) are back in the model.

        Args:
            state: What :meth:`state_dict` returned when that checkpoint was saved. Restore what belongs to the weights,
                such as scales; the clock does not go back.
        """

    def claims(self, state: State) -> dict[str, str]:
        """By module name the work that no other modifier of the recipe may do as well, such as ``"quantize"``.

        Called before :meth:`on_initialize`; it changes nothing.
        """
        return {}

    def touches(self, state: State) -> set[str]:
        """Names of the modules whose weights it works on; by default those it :meth:`claims`."""
        return set(self.claims(state))

    def conflict(self, other: "Modifier", state: State, earlier: bool) -> str | None:
        """Why it cannot work beside ``other``, and what to do; None if it can. Called before :meth:`on_initialize`.

        Args:
            other: Another modifier of the recipe.
            state: State with the model.
            earlier: True when ``other`` comes before it in the recipe.
        """
        return None

    def takes_over(self, earlier: "Modifier", modules: set[str], state: State) -> bool:
        """Whether it can continue from the result of ``earlier`` on ``modules``. Called before :meth:`on_initialize`.

        If so, :meth:`make_room` is called before that calibration, and it continues at CALIBRATION_END, which it gets
        after ``earlier``.
        """
        return False

    def make_room(self) -> None:
        """Called before CALIBRATION_START: remove what hides the modules to take over from other modifiers."""

    def interrupt(self) -> None:
        """The run stops: hooks are removed. If it goes on, an open window starts again, with :attr:`resumed`."""
        self.remove_hooks()
        self._started, self._resumed = False, self._started or self._resumed

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Primitives and tensors only. Subclasses add to what ``super().state_dict()`` returns."""
        started, ended = self._started or self._resumed, self._ended or self._over
        clock = {"started": started, "ended": ended, "updates": self._updates}
        return clock | ({"handed_over": self._handed_over} if self.needs.hand_over else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        ``on_start`` and ``on_end`` run in pairs in one process: an open window starts again at the first batch (see
        :attr:`resumed`), a closed one stays closed.
        """
        self._resumed, self._updates, self._over = state["started"], state["updates"], state["ended"]
        self._ended = self._over and not self._started
        self._handed_over = state.get("handed_over", False)


# pydantic allows these without an annotation; else its error would come before that of refuse_old_names
Modifier.__class_vars__.update(["needs", *OLD_NAMES])


@contextmanager
def _each_warning_once(messages: set[str]) -> Iterator[None]:
    """Pass on only the warnings whose text is not in ``messages`` yet, when the block ends."""
    records: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as records:
            yield
    finally:
        for record in records:
            if str(record.message) not in messages:
                messages.add(str(record.message))
                warnings.warn_explicit(record.message, record.category, record.filename, record.lineno)


def _overrides(modifier: Modifier, *names: str) -> bool:
    """True when its class has its own version of one of these methods."""
    return any(getattr(type(modifier), name) is not getattr(Modifier, name) for name in names)


def _has_window(modifier: Modifier) -> bool:
    """True when ``start``, ``end`` and ``update`` have a meaning."""
    if modifier.needs.window is not None:
        return modifier.needs.window
    handled = _overrides(modifier, "on_start", "on_update", "on_end", "on_event")
    return handled or modifier.needs.hand_over or not modifier.acts_after_training
