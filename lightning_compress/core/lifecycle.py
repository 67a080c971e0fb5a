"""Ordered modifiers, and the events that reach them.

The lifecycle checks the order of events, passes each to the modifiers in recipe order, and holds the state that a
checkpoint needs. It knows neither Lightning nor calibration: the callback, ``compress`` and the walk call
:meth:`Lifecycle.emit`. Handlers run with float32 as default dtype and without autocast, whatever the run's precision.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import permutations
from typing import Any

from torch import Tensor

from lightning_compress.core.events import Event, EventType
from lightning_compress.core.modifier import Modifier
from lightning_compress.core.precision import plain_precision
from lightning_compress.core.state import State

__all__ = ["Lifecycle", "modifiers_in_order"]

E = EventType
_TRAINING = {E.LOSS_CALCULATED, E.OPTIM_PRE_STEP, E.OPTIM_POST_STEP}
# What may come directly before; None is the time outside of any batch. A batch may hold several optimizers (GANs), and
# an optimizer that evaluates its closure several times (LBFGS).
_BEFORE: dict[EventType, set[EventType | None]] = {
    E.BATCH_START: {None, E.BATCH_END, E.CALIBRATION_END},
    E.LOSS_CALCULATED: {E.BATCH_START, *_TRAINING},
    E.OPTIM_PRE_STEP: {E.BATCH_START, *_TRAINING},
    E.OPTIM_POST_STEP: {E.OPTIM_PRE_STEP},
    E.BATCH_END: {E.BATCH_START, *_TRAINING},
    E.TRAINING_END: {None, E.BATCH_END, E.CALIBRATION_END},
    E.CALIBRATION_START: {None, E.BATCH_END, E.TRAINING_END, E.CALIBRATION_END},
    E.BLOCK_SURVEYED: {E.CALIBRATION_START, E.BLOCK_SURVEYED},
    E.MODULE_READY: {E.CALIBRATION_START, E.BLOCK_SURVEYED, E.MODULE_READY, E.BLOCK_END},
    E.BLOCK_END: {E.CALIBRATION_START, E.BLOCK_SURVEYED, E.MODULE_READY, E.BLOCK_END},
    E.CALIBRATION_END: {E.CALIBRATION_START, E.BLOCK_SURVEYED, E.BLOCK_END},
}


def modifiers_in_order(modifiers: Any) -> list[Any]:
    """One modifier, an iterable of them, or the values of a mapping, as a list; their types are not checked here."""
    if isinstance(modifiers, Mapping):
        return list(modifiers.values())
    single = isinstance(modifiers, Modifier | type | str) or not isinstance(modifiers, Iterable)
    return [modifiers] if single else list(modifiers)


class Lifecycle:
    """The modifiers of one run.

    Args:
        modifiers: Modifiers in recipe order; a class may occur twice.
    """

    def __init__(self, modifiers: Sequence[Modifier]):
        if not modifiers:
            raise ValueError("no modifiers: expected at least one, such as GPTQModifier(scheme='W4A16')")
        for modifier in modifiers:
            if isinstance(modifier, type):
                name = modifier.__name__
                raise ValueError(f"expected a Modifier, got the class {name}: write {name}(...)")
            if not isinstance(modifier, Modifier):
                raise ValueError(f"expected a Modifier, got {type(modifier).__name__}: {modifier!r}")
        if len({id(m) for m in modifiers}) < len(modifiers):
            raise ValueError("the same modifier object is in the recipe twice; create two")
        self.modifiers = list(modifiers)
        self.last: EventType | None = None

    @property
    def initialized(self) -> bool:
        return all(m.initialized for m in self.modifiers)

    @property
    def finalized(self) -> bool:
        return all(m.finalized for m in self.modifiers)

    @property
    def windowed(self) -> bool:
        """Whether a modifier acts during training, which needs the experts of a mixture in one tensor."""
        return any(m.start is not None for m in self.modifiers)

    @plain_precision()
    def initialize(self, state: State, event: Event | None = None, **kwargs: Any) -> None:
        """Initialize every modifier; when one fails, the hooks of all are removed and the error is raised.

        Raises:
            ValueError: Two modifiers claim the same work on a module and the later does not continue from the earlier
                (all three are named), a modifier hands over and none continues, or two cannot work side by side.
        """
        with self._hooks_off_on_error():
            self._check_claims(state)
            self._check_pairs(state)
            for modifier in self.modifiers:
                modifier.initialize(state, event, **kwargs)

    def _check_claims(self, state: State) -> None:
        owners: dict[tuple[str, str], tuple[str, Modifier]] = {}
        several = len(self.modifiers) > 1 or any(m.needs.hand_over for m in self.modifiers)
        for key, modifier in zip(self.keys(), self.modifiers, strict=True) if several else ():
            claimed = dict.fromkeys(modifier.claims(state).items(), (key, modifier))
            for other, earlier in dict(owners[claim] for claim in claimed if claim in owners).items():
                shared = [claim for claim in claimed if owners.get(claim, (None,))[0] == other]
                modules = {module for module, _ in shared}
                if not (earlier.needs.hand_over and modifier.takes_over(earlier, modules, state)):
                    raise ValueError(_clash(*shared[0], other, earlier, key, modifier))
            owners |= claimed
        for (module, what), (key, modifier) in owners.items():
            if modifier.needs.hand_over:
                raise ValueError(
                    f"{key} has start={modifier.start}, so it will {what} {module!r} during training, and no "
                    f"later modifier of the recipe trains on from the result; add one, such as a QATModifier with the "
                    f"same targets, scheme and start, or leave start out: then it acts after training"
                )

    def _check_pairs(self, state: State) -> None:
        pairs = permutations(enumerate(zip(self.keys(), self.modifiers, strict=True)), 2)
        for (place, (key, modifier)), (other_place, (other_key, other)) in pairs:
            if (why := modifier.conflict(other, state, earlier=other_place < place)) is not None:
                raise ValueError(f"{key} cannot work beside {other_key}: {why}")

    @plain_precision()
    def finalize(self, state: State, **kwargs: Any) -> None:
        """Finalize every modifier; when one fails, the hooks of all are removed and the error is raised."""
        with self._hooks_off_on_error():
            for modifier in self.modifiers:
                modifier.finalize(state, **kwargs)
        self.last = None

    @plain_precision()
    def emit(self, state: State, event: Event, only: Sequence[Modifier] | None = None, **kwargs: Any) -> None:
        """Pass an event to the modifiers, in order.

        Args:
            state: State at this event.
            event: The event and its clock.
            only: Modifiers that get it; None: all.
            **kwargs: Passed on to the handlers.

        Raises:
            ValueError: The event cannot follow the one before it, or is INITIALIZE or FINALIZE (these are methods).
        """
        self.check_order(event.type_)
        for modifier in self.modifiers if event.type_ == EventType.CALIBRATION_START else ():
            modifier.make_room()
        for modifier in self.modifiers if only is None else only:
            modifier.update_event(state, event, **kwargs)

    def handing_over(self, event: Event) -> "Lifecycle | None":
        """Modifiers that calibrate before the batch of ``event``, and those of training; None where none calibrates."""
        due = [m.needs.hand_over and not m.handed_over and m.should_start(event) for m in self.modifiers]
        if not any(due):
            return None
        return Lifecycle([m for m, now in zip(self.modifiers, due, strict=True) if now or not m.acts_after_training])

    @property
    def after_training(self) -> "Lifecycle":
        """Modifiers that act after training: all but those that hand over before."""
        return Lifecycle([m for m in self.modifiers if not m.needs.hand_over])

    @property
    def acting(self) -> bool:
        """True when the events of this batch can reach a handler of a modifier."""
        return any(m.acting for m in self.modifiers)

    def skip_batch(self) -> None:
        """Note that the other events of this batch are left out, as no modifier acts."""
        self.last = None

    def check_order(self, type_: EventType | None) -> None:
        """Note an event; ValueError names it and the last one when it cannot follow that."""
        if type_ is None or type_ not in _BEFORE:
            raise ValueError(f"{type_} is not emitted; call initialize() or finalize()")
        if self.last not in _BEFORE[type_]:
            before = " or ".join(sorted("nothing" if e is None else e.name for e in _BEFORE[type_]))
            last = "nothing" if self.last is None else self.last.name
            raise ValueError(f"event {type_.name} after {last}: expected it after {before}")
        self.last = type_

    def abort(self) -> None:
        """Remove all hooks and forget the open batch, after an exception."""
        for modifier in self.modifiers:
            modifier.interrupt()
        self.last = None

    @contextmanager
    def _hooks_off_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.abort()
            raise

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pause the hooks of all modifiers; can be nested."""
        with ExitStack() as stack:
            for modifier in self.modifiers:
                stack.enter_context(modifier.paused())
            yield

    @contextmanager
    def dense_pass(self) -> Iterator[None]:
        """Pause the hooks of all modifiers but those with ``needs.dense_inputs``."""
        with ExitStack() as stack:
            for modifier in self.modifiers:
                stack.enter_context(modifier.in_dense_pass() if modifier.needs.dense_inputs else modifier.paused())
            yield

    def set_token_mask(self, mask: Tensor | None, number: int = 0) -> None:
        """Give the modifiers the mask of the tokens of the current batch that are not padding, and its number."""
        for modifier in self.modifiers:
            modifier._token_mask, modifier._batch_number = mask, number

    def keys(self) -> list[str]:
        """One name per modifier, stable across runs: ``GPTQModifier``, or ``GPTQModifier#2`` for a second one."""
        seen: Counter[str] = Counter()
        names = []
        for name in (m.name for m in self.modifiers):
            seen[name] += 1
            names.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
        return names

    def state_dict(self) -> dict[str, Any]:
        return {key: modifier.state_dict() for key, modifier in zip(self.keys(), self.modifiers, strict=True)}

    @plain_precision()
    def weights_loaded(self, state: dict[str, Any]) -> None:
        """The weights of a checkpoint are loaded; ``state`` is what :meth:`state_dict` returned when it was saved."""
        for key, modifier in zip(self.keys(), self.modifiers, strict=True):
            if key in state:
                modifier.on_weights_loaded(state[key])

    @plain_precision()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; ValueError when the modifiers are not those of this recipe."""
        if list(state) != self.keys():
            raise ValueError(
                f"the checkpoint was written with the modifiers {list(state)}, this recipe has {self.keys()}; "
                f"resume with the recipe of the first run"
            )
        for key, modifier in zip(self.keys(), self.modifiers, strict=True):
            modifier.load_state_dict(state[key])


def _clash(module: str, what: str, first: str, earlier: Modifier, second: str, later: Modifier) -> str:
    hint = ""
    would_hand_over = earlier.model_copy(update={"start": later.start}).needs.hand_over
    if would_hand_over and type(later).takes_over is not Modifier.takes_over:
        hint = f"; give {first} the start of {second} if {second} must train on from its result"
    return (
        f"two modifiers of the recipe {what} {module!r}, {first} and {second}; give them different targets, or let one "
        f"of them ignore it{hint}"
    )
