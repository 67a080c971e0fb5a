"""The window: when it opens and closes, its updates, and warnings about its length."""

import warnings

import pytest

from lightning_compress.core import Event, EventType, Lifecycle, Modifier, State

E = EventType


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
