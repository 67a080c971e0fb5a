"""Every rule of the modifier's contract: arguments, windows, the order of handlers, hooks, checkpoints."""

import copy
import pickle
import warnings
from typing import Any, Literal

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


class NeedyModifier(TargetModifier):
    sparsity: float


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (TargetModifier, {"taregts": ["x"]}, "TargetModifier: unknown argument 'taregts'; did you mean 'targets'?"),
        (TargetModifier, {"zzz": 1}, "unknown argument 'zzz'; known: index, group, start, .*, targets, block_size"),
        (TargetModifier, {"started_": True}, "unknown argument 'started_'"),  # an ordinary field in the reference
        (TargetModifier, {"_started": True}, "unknown argument '_started'"),
        (TargetModifier, {"block_size": "many"}, "TargetModifier: block_size='many': .*integer"),
        (TargetModifier, {"block_size": "many", "zzz": 1}, "(?s)block_size='many'.*\n.*'zzz'"),
        (TargetModifier, {"unit": "steps"}, "unit='steps': .*'step', 'epoch' or 'fraction'"),
        (TargetModifier, {"start": torch.inf}, "start=inf: Input should be a finite number"),
        (TargetModifier, {"update": 0}, "update=0.0 must be positive; leave it out"),
        (TargetModifier, {"start": 5, "end": 3}, r"end=3.0 must lie after start=5.0 \(unit: step\); leave end out"),
        (TargetModifier, {"start": 5, "end": 5}, "end=5.0 must lie after start=5.0"),  # such a window never opens
        (NeedyModifier, {}, "NeedyModifier: argument 'sparsity' is missing"),
    ],
)
def test_a_wrong_argument_is_named(cls, arguments, message):
    with pytest.raises(ValueError, match=message) as raised:
        cls(**arguments)
    assert "pydantic" not in str(raised.value)


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
    with pytest.raises(RuntimeError, match=f"HalfWay.on_initialize returned {answer}, expected True.*nothing of it"):
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


@pytest.mark.parametrize(
    ("start", "end", "index", "starts", "ends"),
    [
        (None, None, 3, False, False), (None, 2, 3, False, True), (2, None, 1, False, False), (2, None, 2, True, False),
        (2, 4, 3, True, False), (2, 4, 4, False, True), (2, 4, 5, False, True), (-1, None, 0, True, False),
    ],
)  # fmt: skip
def test_should_start_and_should_end(recording, start, end, index, starts, ends):
    modifier, event = recording(start=start, end=end), Event(E.BATCH_START, index)
    assert modifier.should_start(event) is starts
    assert modifier.should_end(event) is ends


# -- the clock in a run ----------------------------------------------------------------------------------------------


def test_the_index_is_real(recording, train):
    """In the reference it is 0 at every event, so that start > 0 never starts and end never comes."""
    modifier = recording(start=2, end=4)
    lifecycle = Lifecycle([modifier])
    lifecycle.initialize(State())
    train(lifecycle, 0, 6)
    assert modifier.indices("start") == [2]
    assert modifier.indices("end") == [4]


@pytest.mark.parametrize(
    ("unit", "start", "end", "first", "last"),
    [("step", 2, 4, 2, 4), ("epoch", 2, 4, 20, 40), ("fraction", 0.5, 0.75, 30, 45)],
)
def test_units_are_explicit(recording, train, unit, start, end, first, last):
    modifier = recording(start=start, end=end, unit=unit)
    lifecycle = Lifecycle([modifier])
    lifecycle.initialize(State())
    train(lifecycle, 0, 60, steps_per_epoch=10, total_steps=60)
    scale = {"step": 1, "epoch": 10, "fraction": 60}[unit]
    assert [index * scale for index in modifier.indices("start")] == [first]
    assert [index * scale for index in modifier.indices("end")] == [last]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_no_update_point_is_missed_or_doubled(recording, train, accumulate):
    """update=0.1 epochs at 7 steps per epoch: each step passes one or two points and gets one call."""
    modifier = recording(start=1, end=3, update=0.1, unit="epoch")
    lifecycle = Lifecycle([modifier])
    lifecycle.initialize(State())
    train(lifecycle, 0, 28, accumulate=accumulate, steps_per_epoch=7)
    assert modifier.indices("update") == [step / 7 for step in range(7, 22)]  # at step 21 it comes with on_end


def test_updates_further_apart_than_a_step(recording, train):
    modifier = recording(start=0, update=2.5)
    lifecycle = Lifecycle([modifier])
    lifecycle.initialize(State())
    train(lifecycle, 0, 11)
    assert modifier.indices("update") == [0, 3, 5, 8, 10]
    assert {type_ for handler, type_, _ in modifier._calls if handler == "update"} == {"batch_start"}


def test_a_window_from_zero_updates_like_any_other(recording, train):
    """on_start at initialize and on_start at a batch are followed by the same updates; not so in the reference."""
    runs = []
    for start in (0, 5):
        modifier = recording(start=start, update=3)
        lifecycle = Lifecycle([modifier])
        lifecycle.initialize(State())
        train(lifecycle, 0, start + 8)
        runs.append([index - start for index in modifier.indices("update")])
    assert runs[0] == runs[1] == [0, 3, 6]


def test_an_unknown_epoch_length_is_said_at_the_first_step(recording, train):
    lifecycle = Lifecycle([recording(start=1, unit="epoch")])
    lifecycle.initialize(State())
    with pytest.raises(ValueError, match="unit='epoch' needs a known steps_per_epoch"):
        train(lifecycle, 0, 2)


@pytest.mark.parametrize(("end", "until"), [(None, ""), (120, " and before 120.0")])
def test_a_window_that_never_opened_is_named(recording, train, end, until):
    modifier = recording(start=100, end=end, unit="step")
    lifecycle = Lifecycle([modifier])
    lifecycle.initialize(State())
    train(lifecycle, 0, 3)
    with pytest.warns(UserWarning, match=f"RecordingModifier never started: no training batch .* 100.0{until} "):
        lifecycle.finalize(State())


def test_no_warning_without_a_window_or_after_a_start(recording):
    for modifier in (recording(), recording(start=0)):
        modifier.initialize(State())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            modifier.finalize(State())


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


# -- hooks -----------------------------------------------------------------------------------------------------------


def test_a_hook_sees_each_forward_and_may_replace_input_and_output(recording):
    modifier, layer, seen = recording(), nn.Linear(2, 2, bias=False), []
    layer.weight.data = torch.eye(2)
    modifier.hook(layer, lambda m, args: seen.append(args[0].clone()))
    modifier.hook(layer, lambda m, args: (args[0] * 2,))
    modifier.hook(layer, lambda m, args, out: out + 1, kind="forward")
    assert layer(torch.ones(1, 2)).tolist() == [[3, 3]]
    assert seen[0].tolist() == [[1, 1]]
    assert modifier.hooked == [layer]


def test_nested_pausing_gives_back_what_was_before(recording):
    """Leaving the inner of two pauses switches hooks on again in the reference."""
    modifier, layer, calls = recording(), nn.Linear(2, 2), []
    modifier.hook(layer, lambda m, args: calls.append(1))

    def count() -> int:
        calls.clear()
        layer(torch.ones(1, 2))
        return len(calls)

    assert count() == 1
    with modifier.paused():
        assert count() == 0
        with pytest.raises(KeyError), modifier.paused():
            raise KeyError
        assert count() == 0
    assert count() == 1


def test_pausing_one_modifier_leaves_the_other(recording):
    one, two, layer, calls = recording(), recording(), nn.Linear(2, 2), []
    one.hook(layer, lambda m, args: calls.append("one"))
    two.hook(layer, lambda m, args: calls.append("two"))
    with one.paused():
        layer(torch.ones(1, 2))
    assert calls == ["two"]


def test_a_pickled_model_leaves_the_modifier_behind(recording):
    modifier, layer, calls = recording(), nn.Linear(2, 2), []
    modifier.hook(layer, lambda m, args: calls.append(1))
    copied, loaded = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    loaded(torch.ones(1, 2))
    assert calls == []
    copied(torch.ones(1, 2))
    assert calls == [1]


def test_hooks_of_some_modules_come_off(recording):
    modifier, a, b = recording(), nn.Linear(2, 2), nn.Linear(2, 2)
    for module in (a, b, a):
        modifier.hook(module, lambda *args: None)
    assert modifier.hooked == [a, b]
    modifier.remove_hooks(a)
    assert modifier.hooked == [b]
    assert not a._forward_pre_hooks
    assert b._forward_pre_hooks
    modifier.remove_hooks()
    assert modifier.hooked == []
    assert not b._forward_pre_hooks


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


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"start": 0, "end": 4}, None),
        ({"start": 0, "end": 40}, "end=40 lies past the end of the run, which covers 50% .*: the run has 20 steps$"),
        ({"start": 20}, "start=20 is not before the end of the run, so it will never start: the run has 20 steps$"),
        ({"start": 1, "end": 5, "unit": "epoch"}, "covers 75% of the window: the run has 20 steps, 4 in unit 'epoch'"),
        ({"start": 0, "end": 1, "unit": "fraction"}, None),
        ({"start": None, "end": 99}, None),
    ],
    ids=str,
)
def test_a_window_longer_than_the_run_is_told(arguments, told):
    class Sleeping(Modifier):
        def on_initialize(self, state, **kwargs):
            return True

    event = Event(EventType.BATCH_START, steps_per_epoch=5, total_steps=20)
    if told is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Sleeping(**arguments).check_length(event)
    else:
        with pytest.warns(UserWarning, match=f"Sleeping: .*{told}"):
            Sleeping(**arguments).check_length(event)
    Sleeping(**arguments).check_length(Event(EventType.BATCH_START))  # a length that is not known


def test_an_update_larger_than_the_window_is_refused():
    class Sleeping(Modifier):
        def on_initialize(self, state, **kwargs):
            return True

    with pytest.raises(ValueError, match="update=5.0 is larger than the window from 1.0 to 4.0 .unit: epoch.*most 3"):
        Sleeping(start=1, end=4, update=5, unit="epoch")


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


class Numbers(Modifier):
    count: int | None = None
    size: int | Literal["auto"] | list[int] | None = None
    pattern: str = "unstructured"
    names: str | list[str] = []
    flag: bool = False
    either: bool | float = 0.5

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        return True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": True}, "count=True: expected a number"),
        ({"size": False}, "size=False: expected a number"),
        ({"start": True}, "start=True: expected a number"),
        ({"pattern": 124}, "pattern=124: expected a text, got a number, as YAML reads 2:4; write it in quotes"),
        ({"names": 3}, "names=3: expected a text, got a number; write it in quotes"),
        ({"start": float("nan")}, "start=nan: Input should be a finite number"),
        ({"start": 0, "end": float("inf")}, "end=inf: Input should be a finite number"),
        ({"unit": "fraction", "start": 25, "end": 75}, "start=25, end=75 lies after the end of the run, which is 1 in"),
        ({"self": 3}, "unknown argument 'self'"),
        ({"cls": 3}, "unknown argument 'cls'"),
    ],
)
def test_what_yaml_makes_of_a_slip_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Numbers(**arguments)


def test_what_is_meant_passes():
    made = Numbers(count=3, size="auto", flag=True, either=True, unit="fraction", start=0.25, end=1)
    assert (made.count, made.size, made.flag, made.either, made.end) == (3, "auto", True, True, 1.0)
