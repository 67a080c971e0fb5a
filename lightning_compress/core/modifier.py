"""A modifier: one compression technique with its arguments, its window in time, and its handlers.

It keeps the names that llm-compressor documents, so that a modifier written for it runs here, and mends its clock.
Arguments are the annotated fields of the class (pydantic validates them and refuses unknown ones); run-time state is
private: names that begin with an underscore.
"""

import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from reprlib import repr as short
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import torch
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, model_validator
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_compress.core.events import Event, EventType, Unit
from lightning_compress.core.needs import OLD_NAMES, Needs, refuse_old_names
from lightning_compress.core.precision import plain_precision
from lightning_compress.core.state import State

__all__ = ["Modifier", "ModifierInterface"]

HookKind = Literal["forward_pre", "forward"]

_AFTER_TRAINING = {
    EventType.TRAINING_END: "on_training_end",
    EventType.CALIBRATION_START: "on_calibration_start",
    EventType.BLOCK_SURVEYED: "on_block_surveyed",
    EventType.MODULE_READY: "on_module_ready",
    EventType.BLOCK_END: "on_block_end",
    EventType.CALIBRATION_END: "on_calibration_end",
}


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

    Raises:
        ValueError: An argument is unknown (near misses are named) or has a value that it cannot have.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, validate_default=True, allow_inf_nan=False)

    index: int | None = None
    group: str | None = None
    start: float | None = None
    end: float | None = None
    update: float | None = None
    unit: Unit = "step"

    _initialized: bool = PrivateAttr(default=False)
    _finalized: bool = PrivateAttr(default=False)
    _started: bool = PrivateAttr(default=False)  # on_start ran in this process
    _resumed: bool = PrivateAttr(default=False)  # on_start ran in the run that this one continues
    _ended: bool = PrivateAttr(default=False)
    _over: bool = PrivateAttr(default=False)  # on_end ran in the run that this one continues
    _updates: int = PrivateAttr(default=0)  # update points already delivered
    _paused: int = PrivateAttr(default=0)
    _handed_over: bool = PrivateAttr(default=False)
    _token_mask: Tensor | None = PrivateAttr(default=None)
    _hooks: list[tuple[nn.Module, RemovableHandle]] = PrivateAttr(default_factory=list)
    _warned: set[str] = PrivateAttr(default_factory=set)  # texts of the warnings of set-up
    _entry: str | None = PrivateAttr(default=None)

    def __init__(self, /, **arguments: Any) -> None:
        try:
            super().__init__(**arguments)
        except ValidationError as error:
            raise ValueError(_readable(type(self), error)) from None

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        refuse_old_names(cls.__name__, [*vars(cls), *cls.model_fields])
        if "needs" in cls.model_fields:
            raise ValueError(f"{cls.__name__}: needs is not an argument; write needs: ClassVar[Needs] = Needs(...)")

    @model_validator(mode="before")
    @classmethod
    def _no_surprise_of_yaml(cls, arguments: Any) -> Any:
        """A number is not read from true, nor a text from a number; pydantic would take the first."""
        for name, value in arguments.items() if isinstance(arguments, dict) else ():
            kinds = _kinds(cls.model_fields[name].annotation) if name in cls.model_fields else {Any}
            if isinstance(value, bool) and kinds & {int, float} and not kinds & {bool, Any}:
                raise ValueError(f"{name}={value}: expected a number (YAML reads yes, no, on, off, true, false so)")
            if isinstance(value, int) and not isinstance(value, bool) and str in kinds and not kinds - {str, list}:
                minutes = f", as YAML reads {value // 60}:{value % 60}" if value >= 60 else ""
                raise ValueError(f"{name}={value}: expected a text, got a number{minutes}; write it in quotes")
        return arguments

    @model_validator(mode="after")
    def _window_is_possible(self) -> "Modifier":
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
                f"so that nothing would change inside of it; give at most {self.end - self.start:g}"
            )
        given = {n: getattr(self, n) for n in ("start", "end", "update") if getattr(self, n) is not None}
        if given and not _has_window(self):
            named = ", ".join(f"{name}={value:g}" for name, value in given.items())
            raise ValueError(
                f"{named} would do nothing: {self.name} works on calibration data, once training is over, on the "
                f"weights that it ends with; leave it out"
            )
        return self

    @property
    def name(self) -> str:
        """The name for messages and checkpoints: the class, and its group when it has one."""
        return f"{type(self).__name__}[{self.group}]" if self.group else type(self).__name__

    def changed(self, names: Iterable[str]) -> list[str]:
        """Those of these arguments that differ from their default, which LightningCLI and dumped recipes spell out."""
        fields = type(self).model_fields
        usual = {name: fields[name].get_default(call_default_factory=True) for name in names}
        return sorted(name for name, value in usual.items() if getattr(self, name) != value)

    def called(self, entry: str) -> None:
        """Whoever reads the recipe says under which name this modifier stands there."""
        self._entry = entry

    def override(self, argument: str, value: Any) -> str:
        """For messages: what to type to set an argument, where a Hydra app is running that named this modifier."""
        hydra = sys.modules.get("hydra.core.hydra_config")
        if self._entry is None or hydra is None or not hydra.HydraConfig.initialized():
            return ""
        return f"; on the command line: callbacks.compress.modifiers.{self._entry}.{argument}={value}"

    @property
    def needs(self) -> Needs:
        """What it needs from a run; a class declares ``needs = Needs(...)``, or overrides this with a property."""
        return Needs()

    @property
    def handles_training_end(self) -> bool:
        """True when its class has a handler for TRAINING_END."""
        return type(self).on_training_end is not Modifier.on_training_end

    @property
    def acts_after_training(self) -> bool:
        """True when it changes the model once training is over, with calibration or without."""
        return self.needs.calibration or self.handles_training_end

    @property
    def handed_over(self) -> bool:
        """With ``needs.hand_over``: True once the calibration at ``start`` is done."""
        return self._handed_over

    def note_handed_over(self) -> None:
        """Whoever drives the run says so: the calibration at ``start`` is over."""
        self._handed_over = self.needs.hand_over

    @property
    def initialized(self) -> bool:
        return self._initialized

    @property
    def finalized(self) -> bool:
        return self._finalized

    @property
    def resumed(self) -> bool:
        """True when the run continues a checkpoint in which the window had opened already.

        Hooks do not survive a process, so :meth:`on_start` runs again at the first batch. It puts them on, and asks
        here before it overwrites what :meth:`load_state_dict` or the model's own state brought back.
        """
        return self._resumed

    # -- the life of a modifier --------------------------------------------------------------------------------------

    def initialize(self, state: State, event: Event | None = None, **kwargs: Any) -> None:
        """Run :meth:`on_initialize`, then start if the window begins at index 0. When either fails, hooks come off.

        Raises:
            RuntimeError: It is initialized or finalized already, or ``on_initialize`` returned False.
        """
        if self._finalized:
            raise RuntimeError(f"cannot initialize {self.name}: it is finalized; make a new one")
        if self._initialized:
            raise RuntimeError(f"cannot initialize {self.name} twice; make a new one")
        try:
            with _each_warning_once(self._warned):
                done = self.on_initialize(state, **kwargs)
            if not done:
                raise RuntimeError(
                    f"{self.name}.on_initialize returned {done!r}, expected True: it could not prepare the model, "
                    f"and nothing of it stays attached; check its arguments"
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
        """Run :meth:`on_finalize`; all hooks come off, also when it fails. Warns when the window never opened.

        Raises:
            RuntimeError: It was finalized before, never initialized, or ``on_finalize`` returned False.
        """
        if self._finalized:
            raise RuntimeError(f"cannot finalize {self.name} twice")
        if not self._initialized:
            raise RuntimeError(f"cannot finalize {self.name}: it was never initialized")
        try:
            done = self.on_finalize(state, **kwargs)
        finally:
            self.remove_hooks()
        if not done:
            raise RuntimeError(f"{self.name}.on_finalize returned {done!r}, expected True")
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
            RuntimeError: It is not initialized, or finalized.
        """
        if not self._initialized:
            raise RuntimeError(f"{self.name} got {event.type_} before it was initialized")
        if self._finalized:
            raise RuntimeError(f"{self.name} got {event.type_} after it was finalized")
        event = event.in_unit(self.unit)
        self.on_event(state, event, **kwargs)
        if event.type_ in (EventType.TRAINING_END, EventType.CALIBRATION_START):  # targets are looked for again
            with _each_warning_once(self._warned):
                getattr(self, _AFTER_TRAINING[event.type_])(state, event, **kwargs)
            return
        if event.type_ in _AFTER_TRAINING:
            getattr(self, _AFTER_TRAINING[event.type_])(state, event, **kwargs)
            return
        opened = self._started and not self._ended
        if event.type_ == EventType.BATCH_START and not (self._started or self._ended) and self.should_start(event):
            self._start(state, event, **kwargs)
        elif event.type_ == EventType.BATCH_END and opened and self.should_end(event):
            self.on_end(state, event, **kwargs)
            self._ended = True
            self.on_update(state, event, **kwargs)
        elif event.type_ == EventType.BATCH_START and opened and self._resumed and self.should_end(event):
            self.on_end(state, event, **kwargs)  # resumed past the end: what on_start put on comes off
            self._ended = True
        if self._started and not self._ended and self._is_due(event):
            self.on_update(state, event, **kwargs)

    def _start(self, state: State, event: Event, **kwargs: Any) -> None:
        self.on_start(state, event, **kwargs)
        self._started = True

    def _is_due(self, event: Event) -> bool:
        """Without ``update``: always. With it: once at the first BATCH_START at or after each update point."""
        if self.update is None or event.type_ != EventType.BATCH_START:
            return self.update is None
        due, done = event.due_count(self.start or 0.0, self.update), self._updates
        self._updates = max(due, done)
        return due > done

    @property
    def acting(self) -> bool:
        """Whether events of a batch can reach a handler: the window is open, or the class decides that for itself."""
        deciding = ("on_event", "update_event", "should_start")
        own = any(getattr(type(self), name) is not getattr(Modifier, name) for name in deciding)
        return own or (self._started and not self._ended)

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
            told = f"start={self.start:g} is not before the end of the run, so it will never start"
        elif self.end is not None and self.end > length:
            share = (length - self.start) / (self.end - self.start)
            told = f"end={self.end:g} lies past the end of the run, which covers {share:.0%} of the window"
        else:
            return
        warnings.warn(f"{self.name}: {told}: the run has {event.total_steps} {kind}{counted}", stacklevel=2)

    # -- handlers: override what you need ----------------------------------------------------------------------------

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

    def on_training_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Called once, after training and before calibration, also when no training took place; on rank zero.

        The place for work on the final weights that needs no calibration data. The model is in eval mode, without
        gradients, and its weights are finite.
        """

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Hook the targets (:meth:`hook`)."""

    def on_block_surveyed(self, state: State, event: Event, **kwargs: Any) -> None:
        """With ``needs.survey``: the dense ``state.modules`` have seen all inputs; put on the hooks for the walk."""

    def on_module_ready(self, state: State, event: Event, **kwargs: Any) -> None:
        """One-pass walk: ``state.modules`` have seen all their inputs; finish them now."""

    def on_block_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """``state.block`` has seen all its inputs; finish what is left of ``state.modules``."""

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Name the targets that never saw data; drop statistics."""

    def on_weights_loaded(self, state: dict[str, Any]) -> None:
        """The weights of an earlier checkpoint (the best one) are back in the model.

        Args:
            state: What :meth:`state_dict` gave when that checkpoint was saved. Take from it what belongs to the
                weights, such as scales; the clock has moved on.
        """

    def claims(self, state: State) -> dict[str, str]:
        """What no other modifier of the recipe may do as well: by module name, such as ``"quantize"``.

        Asked before :meth:`on_initialize`; nothing is changed here.
        """
        return {}

    def touches(self, state: State) -> set[str]:
        """Names of the modules whose weights it works on; by default what it :meth:`claims`. Asked when claims are."""
        return set(self.claims(state))

    def conflict(self, other: "Modifier", state: State, earlier: bool) -> str | None:
        """Why it cannot work beside ``other``, and what to do; None when it can. Asked before :meth:`on_initialize`.

        Args:
            other: Another modifier of the recipe.
            state: For the model.
            earlier: ``other`` stands before it in the recipe.
        """
        return None

    def takes_over(self, earlier: "Modifier", modules: set[str], state: State) -> bool:
        """Asked before :meth:`on_initialize`: can it go on from what ``earlier`` makes of ``modules``?

        If so, it makes room (:meth:`make_room`) for that, and goes on at CALIBRATION_END, which it gets after
        ``earlier``.
        """
        return False

    def make_room(self) -> None:
        """Before CALIBRATION_START reaches anyone: take off what keeps others from the modules that are taken over."""

    # -- hooks -------------------------------------------------------------------------------------------------------

    def hook(
        self, module: nn.Module, function: Callable[..., Any], kind: str = "forward_pre", with_kwargs: bool = False
    ) -> RemovableHandle:
        """Call ``function`` at every forward of ``module`` until :meth:`remove_hooks`, except while paused.

        It finds float32 as default dtype and no autocast, whatever the model runs in (compiled: as they are).

        Args:
            module: Where the hook goes.
            function: ``(module, args)`` for ``forward_pre``, ``(module, args, output)`` for ``forward``; what it
                returns replaces the input or the output, as in torch.
            kind: ``forward_pre`` or ``forward``.
            with_kwargs: The function takes the call's keyword arguments too, after ``args``, as in torch.
        """
        register = getattr(module, f"register_{kind}_hook")
        handle: RemovableHandle = register(_UnlessPaused(self, function), with_kwargs=with_kwargs)
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
        """Take off the hooks of some modules; without an argument all of them."""
        for module, handle in self._hooks:
            if not modules or module in modules:
                handle.remove()
        self._hooks = [pair for pair in self._hooks if modules and pair[0] not in modules]

    def interrupt(self) -> None:
        """The run stops here: hooks come off. Should it go on, an open window starts again, with :attr:`resumed`."""
        self.remove_hooks()
        self._started, self._resumed = False, self._started or self._resumed

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Primitives and tensors only. Subclasses add to what ``super().state_dict()`` returns."""
        started, ended = self._started or self._resumed, self._ended or self._over
        clock = {"started": started, "ended": ended, "updates": self._updates}
        return clock | ({"handed_over": self._handed_over} if self.needs.hand_over else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave.

        ``on_start`` and ``on_end`` run in pairs inside one process: a window that is open starts again at the first
        batch (see :attr:`resumed`), one that is over stays over.
        """
        self._resumed, self._updates, self._over = state["started"], state["updates"], state["ended"]
        self._ended = self._over and not self._started
        self._handed_over = state.get("handed_over", False)


# these may be declared without an annotation; else pydantic's complaint comes before that of refuse_old_names
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


class _UnlessPaused:
    """A hook of a modifier. A pickled model leaves the modifier behind, and its hooks then do nothing."""

    def __init__(self, modifier: Modifier | None = None, function: Callable[..., Any] | None = None):
        self.modifier, self.function = modifier, function

    def __call__(self, *args: Any) -> Any:
        if self.modifier is None or self.modifier._paused or not self.function:
            return None
        if torch.compiler.is_compiling():  # dynamo cannot trace a change of the default dtype
            return self.function(*args)
        with plain_precision():
            return self.function(*args)

    def __copy__(self) -> "_UnlessPaused":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "_UnlessPaused":
        return self  # as functions do

    def __reduce__(self) -> tuple[Any, ...]:
        return _UnlessPaused, ()


def _has_window(modifier: Modifier) -> bool:
    """Whether ``start``, ``end`` and ``update`` mean something to it."""
    if modifier.needs.window is not None:
        return modifier.needs.window
    handlers = ("on_start", "on_update", "on_end", "on_event")
    handled = any(getattr(type(modifier), name) is not getattr(Modifier, name) for name in handlers)
    return handled or modifier.needs.hand_over or not modifier.acts_after_training


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation names, without those inside of lists and mappings."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return {type(value) for value in inner}
    if origin is Annotated:
        return _kinds(inner[0])
    if origin in (Union, UnionType):
        return set().union(*map(_kinds, inner)) - {NoneType}
    return {origin or annotation}


def _readable(modifier: type[Modifier], error: ValidationError) -> str:
    """One line for each wrong argument."""
    lines = []
    for fault in error.errors(include_url=False):
        name, message = ".".join(map(str, fault["loc"])), fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden" and len(fault["loc"]) == 1:
            near = get_close_matches(name, modifier.model_fields, cutoff=0.7)
            known = f"known: {', '.join(modifier.model_fields)}"
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else known
            lines.append(f"unknown argument {name!r}; {hint}")
        elif fault["type"] == "missing":
            lines.append(f"argument {name!r} is missing")
        else:
            lines.append(f"{name}={short(fault['input'])}: {message}" if name else message)
    return f"{modifier.__name__}: " + "\n".join(lines)
