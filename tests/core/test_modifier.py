"""Every rule of the modifier's contract: arguments, windows, the order of handlers, hooks, checkpoints."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from lightning_compress.core import Event, EventType, Lifecycle, Modifier, ModifierInterface, State

E = EventType


def started(modifier, **clock):
    modifier.initialize(State())
    modifier.update_event(State(), Event(E.BATCH_START, **clock))
    return modifier


# -- arguments -------------------------------------------------------------------------------------------------------


class TargetModifier(Modifier):
    targets: list[str] = ["Linear"]
    block_size: int = 128

    def on_initialize(self, state, **kwargs):
        return True


def test_defaults_of_the_fields():
    modifier = TargetModifier()
    assert (modifier.index, modifier.group, modifier.start, modifier.end, modifier.update) == (None,) * 5
    assert modifier.unit == "step"
    assert not modifier.initialized
    assert not modifier.finalized
    assert not modifier.resumed
    assert isinstance(modifier, ModifierInterface)


def test_on_initialize_must_be_written():
    class Lazy(Modifier):
        pass

    with pytest.raises(TypeError, match="on_initialize"):
        Lazy()


def test_copies_share_nothing():
    one = TargetModifier(start=1)
    two, three = copy.deepcopy(one), pickle.loads(pickle.dumps(one))
    one.hook(nn.Linear(2, 2), lambda *a: None)
    one.initialize(State())
    assert two == TargetModifier(start=1)
    assert not two.initialized
    assert not two.hooked
    assert three.start == 1
    assert not three.initialized


# -- initialize and finalize -----------------------------------------------------------------------------------------


def test_initialize_twice(recording):
    modifier = recording()
    modifier.initialize(State())
    assert modifier.initialized
    with pytest.raises(RuntimeError, match="cannot initialize RecordingModifier twice"):
        modifier.initialize(State())


def test_initialize_after_finalize(recording):
    modifier = recording()
    modifier.initialize(State())
    modifier.finalize(State())
    assert modifier.finalized
    with pytest.raises(RuntimeError, match="cannot initialize RecordingModifier: it is finalized"):
        modifier.initialize(State())


@pytest.mark.parametrize("answer", [False, None])
def test_a_failed_initialize_names_the_modifier_and_leaves_nothing(recording, answer):
    layer = nn.Linear(2, 2)

    class HalfWay(recording):
        def on_initialize(self, state, **kwargs):
            self.hook(layer, lambda *a: None)
            return answer

    modifier = HalfWay(start=0)
    with pytest.raises(RuntimeError, match=f"HalfWay.on_initialize returned {answer}, expected True.*its hooks are"):
        modifier.initialize(State())
    assert not modifier.initialized
    assert not layer._forward_pre_hooks
    assert modifier.handlers == []  # the reference calls on_start all the same


@pytest.mark.parametrize("where", ["on_initialize", "on_start"])
def test_an_exception_in_initialize_takes_the_hooks_off(recording, where):
    layer = nn.Linear(2, 2)

    class Broken(recording):
        def on_initialize(self, state, **kwargs):
            self.hook(layer, lambda *a: None)
            return where == "on_start" or 1 / 0

        def on_start(self, state, event, **kwargs):
            raise ZeroDivisionError

    modifier = Broken(start=0)
    with pytest.raises(ZeroDivisionError):
        modifier.initialize(State())
    assert not modifier.initialized
    assert not layer._forward_pre_hooks


def test_finalize_before_initialize_and_twice(recording):
    modifier = recording()
    with pytest.raises(RuntimeError, match="cannot finalize RecordingModifier: it was never initialized"):
        modifier.finalize(State())
    modifier.initialize(State())
    modifier.finalize(State())
    with pytest.raises(RuntimeError, match="cannot finalize RecordingModifier twice"):
        modifier.finalize(State())
    assert modifier.handlers == ["initialize", "finalize"]


def test_on_finalize_that_fails_is_an_error_and_hooks_come_off(recording):
    layer = nn.Linear(2, 2)

    class Refusing(recording):
        def on_finalize(self, state, **kwargs):
            return False

    class Raising(recording):
        def on_finalize(self, state, **kwargs):
            raise KeyError("lost")

    for cls, error in (
        (Refusing, pytest.raises(RuntimeError, match=r"Refusing\.on_finalize returned False")),
        (Raising, pytest.raises(KeyError, match="lost")),
    ):
        modifier = cls()
        modifier.initialize(State())
        modifier.hook(layer, lambda *a: None)
        with error:
            modifier.finalize(State())
        assert not layer._forward_pre_hooks
        assert not modifier.finalized


@pytest.mark.parametrize(("start", "first"), [(None, []), (-1, [0]), (0, [0]), (1, [])])
def test_initialize_starts_at_index_zero(recording, start, first):
    modifier = recording(start=start)
    modifier.initialize(State())
    assert modifier.indices("start") == first
    assert modifier.handlers[0] == "initialize"


def test_initialize_starts_at_zero_in_a_unit_whose_length_is_not_known_yet(recording):
    modifier = recording(start=0, end=0.5, unit="fraction")
    modifier.initialize(State())
    assert modifier.handlers == ["initialize", "start"]


def test_initialize_in_the_middle_of_a_run_leaves_the_start_to_the_first_batch(recording):
    modifier = recording(start=0)
    modifier.initialize(State(), Event(E.BATCH_START, global_step=7))
    assert modifier.handlers == ["initialize"]
    modifier.update_event(State(), Event(E.BATCH_START, global_step=7))
    assert modifier.indices("start") == [7]


# -- update_event ----------------------------------------------------------------------------------------------------


def test_an_event_before_initialize_and_after_finalize(recording):
    modifier = recording()
    with pytest.raises(RuntimeError, match="RecordingModifier got batch_start before it was initialized"):
        modifier.update_event(State(), Event(E.BATCH_START))
    modifier.initialize(State())
    modifier.finalize(State())
    with pytest.raises(RuntimeError, match="RecordingModifier got batch_end after it was finalized"):
        modifier.update_event(State(), Event(E.BATCH_END))


def test_on_event_comes_first_and_always(recording):
    class Eventful(recording):
        def on_event(self, state, event, **kwargs):
            self.note("event", event)

        def on_block_end(self, state, event, **kwargs):
            self.note("block_end", event)

    modifier = Eventful(start=1, end=2)
    modifier.initialize(State())
    for type_, step in [(E.BATCH_START, 0), (E.BATCH_START, 1), (E.BATCH_END, 2), (E.BATCH_START, 3), (E.BLOCK_END, 3)]:
        modifier.update_event(State(), Event(type_, step))
    assert modifier.handlers == [
        "initialize", "event", "event", "start", "update", "event", "end", "update", "event", "event", "block_end",
    ]  # fmt: skip


def test_each_calibration_event_has_its_handler_and_updates_nothing(recording):
    class Calibrating(recording):
        def on_calibration_start(self, state, event, **kwargs):
            self.note("calibration_start", event)

        def on_module_ready(self, state, event, **kwargs):
            self.note("module_ready", event)

        def on_block_end(self, state, event, **kwargs):
            self.note("block_end", event)

        def on_calibration_end(self, state, event, **kwargs):
            self.note("calibration_end", event)

    modifier = started(Calibrating(start=0))
    before = len(modifier.handlers)
    for type_ in (E.CALIBRATION_START, E.MODULE_READY, E.BLOCK_END, E.CALIBRATION_END):
        modifier.update_event(State(), Event(type_))
    assert modifier.handlers[before:] == ["calibration_start", "module_ready", "block_end", "calibration_end"]
    assert all(handler == type_ for handler, type_, _ in modifier._calls[before:])


def test_start_comes_with_an_update_at_batch_start_only(recording):
    modifier = recording(start=2)
    modifier.initialize(State())
    for type_, step in [(E.BATCH_START, 1), (E.BATCH_END, 2), (E.OPTIM_POST_STEP, 2)]:
        modifier.update_event(State(), Event(type_, step))
    assert modifier.handlers == ["initialize"]
    modifier.update_event(State(), Event(E.BATCH_START, 2))
    modifier.update_event(State(), Event(E.BATCH_START, 3))
    assert modifier.handlers == ["initialize", "start", "update", "update"]


def test_end_comes_with_an_update_at_batch_end_only(recording):
    modifier = started(recording(start=0, end=3))
    for type_, step in [(E.BATCH_END, 2), (E.BATCH_START, 3), (E.OPTIM_POST_STEP, 3), (E.BATCH_END, 3)]:
        assert "end" not in modifier.handlers
        modifier.update_event(State(), Event(type_, step))
    assert modifier.handlers[-2:] == ["end", "update"]
    assert modifier.indices("end") == [3]
    count = len(modifier.handlers)
    for type_ in (E.BATCH_START, E.BATCH_END):
        modifier.update_event(State(), Event(type_, 4))
    assert len(modifier.handlers) == count  # over is over


def test_between_start_and_end_every_event_updates(recording):
    modifier = started(recording(start=0))
    for type_ in (E.LOSS_CALCULATED, E.OPTIM_PRE_STEP, E.OPTIM_POST_STEP, E.BATCH_END):
        modifier.update_event(State(), Event(type_, 0))
    updates = [type_ for handler, type_, _ in modifier._calls if handler == "update"]
    assert updates == ["batch_start", "loss_calculated", "optim_pre_step", "optim_post_step", "batch_end"]


def test_end_never_without_start(recording):
    """The reference calls on_end for a modifier that never started."""
    modifier = recording(start=5, end=10)
    modifier.initialize(State())
    for step in (20, 21):
        modifier.update_event(State(), Event(E.BATCH_START, step))
        modifier.update_event(State(), Event(E.BATCH_END, step + 1))
    assert modifier.handlers == ["initialize"]


# -- a run that goes on ----------------------------------------------------------------------------------------------


def test_a_run_that_enters_past_start_starts_at_its_first_batch(recording, train):
    modifier = recording(start=2)
    lifecycle = Lifecycle([modifier])
    lifecycle.initialize(State())
    train(lifecycle, 10, 12)
    assert modifier.indices("start") == [10]
    assert not modifier.resumed


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("stop", [1, 4, 6, 9, 11])
def test_a_resumed_run_updates_as_an_unbroken_one(recording, train, start, stop):
    clock = {"start": start, "end": 10, "update": 2.5}
    whole, one, two = recording(**clock), recording(**clock), recording(**clock)
    for modifier, (first, last) in ((whole, (0, 12)), (one, (0, stop)), (two, (stop, 12))):
        lifecycle = Lifecycle([modifier])
        lifecycle.initialize(State())
        if modifier is two:
            lifecycle.load_state_dict({"RecordingModifier": one.state_dict()})
        train(lifecycle, first, last)
    assert one.indices("update") + two.indices("update") == whole.indices("update")
    if (start, stop) == (0, 11):  # it started at initialize, before the checkpoint said that all is over
        assert two.handlers == ["initialize", "start", "end"]


def test_hooks_come_back_when_a_run_resumes(recording, train):
    """on_start runs again in the new process, and can tell that it is not the first time."""
    first = recording(start=2)
    lifecycle = Lifecycle([first])
    lifecycle.initialize(State())
    train(lifecycle, 0, 5)
    second = recording(start=2)
    lifecycle = Lifecycle([second])
    lifecycle.initialize(State())
    second.load_state_dict(first.state_dict())
    assert second.resumed
    assert second.state_dict() == first.state_dict()
    train(lifecycle, 5, 7)
    assert second.indices("start") == [5]
    lifecycle.finalize(State())


def test_a_window_that_was_over_stays_over(recording, train):
    first, second = recording(start=1, end=3), recording(start=1, end=3)
    for modifier, (begin, last) in ((first, (0, 5)), (second, (5, 8))):
        lifecycle = Lifecycle([modifier])
        lifecycle.initialize(State())
        if modifier is second:
            second.load_state_dict(first.state_dict())
        train(lifecycle, begin, last)
    assert second.handlers == ["initialize"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.finalize(State())


def test_state_is_primitives(recording, tmp_path):
    modifier = started(recording(start=0, update=1), global_step=3)
    torch.save(modifier.state_dict(), tmp_path / "m.pt")
    assert torch.load(tmp_path / "m.pt", weights_only=True) == {"started": True, "ended": False, "updates": 4}


# -- a modifier of the reference -------------------------------------------------------------------------------------


def test_a_modifier_in_the_documented_style_of_llm_compressor_runs_unchanged(train):
    class SmoothModifier(Modifier):
        """Fields, private attributes and handler signatures as its documentation shows them."""

        strength: float = 0.5
        targets: str | list[str] | None = None
        _log: list = __import__("pydantic").PrivateAttr(default_factory=list)

        def on_initialize(self, state: State, **kwargs) -> bool:
            self._log.append(("initialize", state.model, kwargs))
            return True

        def on_start(self, state: State, event: Event, **kwargs):
            self._log.append(("start", event.current_index))

        def on_update(self, state: State, event: Event, **kwargs):
            if event.type_ == EventType.OPTIM_POST_STEP and event.should_update(self.start, self.end, self.update):
                self._log.append(("update", event.current_index, self.initialized, self.finalized))

        def on_end(self, state: State, event: Event, **kwargs):
            self._log.append(("end", event.current_index))

        def on_event(self, state: State, event: Event, **kwargs):
            if event.type_ == EventType.CALIBRATION_START:
                self._log.append(("calibration",))

        def on_finalize(self, state: State, **kwargs) -> bool:
            self._log.append(("finalize",))
            return True

    modifier = SmoothModifier(index=0, group="quant", start=1.0, end=3.0, strength=0.8)
    lifecycle = Lifecycle([modifier])
    model = nn.Linear(2, 2)
    lifecycle.initialize(State(model=model), extra=1)
    train(lifecycle, 0, 4)
    lifecycle.emit(State(), Event(E.CALIBRATION_START))
    lifecycle.finalize(State())
    assert modifier._log == [
        ("initialize", model, {"extra": 1}),
        ("start", 1), ("update", 2, True, False), ("update", 3, True, False), ("end", 3),
        ("calibration",), ("finalize",),
    ]  # fmt: skip


def test_a_warning_of_set_up_is_not_repeated_when_calibration_looks_again(recwarn):
    class Looking(Modifier):
        def on_initialize(self, state, **kwargs):
            warnings.warn("targets leave out 1 LSTM", stacklevel=1)
            return True

        def on_calibration_start(self, state, event, **kwargs):
            warnings.warn("targets leave out 1 LSTM", stacklevel=1)
            warnings.warn("a target is new", stacklevel=1)

    lifecycle = Lifecycle([Looking()])
    lifecycle.initialize(State())
    lifecycle.emit(State(), Event(E.CALIBRATION_START))
    assert [str(w.message) for w in recwarn] == ["targets leave out 1 LSTM", "a target is new"]


def test_what_set_up_warned_of_before_it_failed_is_not_lost():
    class Failing(Modifier):
        def on_initialize(self, state, **kwargs):
            warnings.warn("odd targets", stacklevel=1)
            raise ValueError("no targets")

    with pytest.warns(UserWarning, match="odd targets"), pytest.raises(ValueError, match="no targets"):
        Failing().initialize(State())
