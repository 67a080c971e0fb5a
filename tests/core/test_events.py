"""The clock: its units, and update points that are never missed."""

import dataclasses
from fractions import Fraction

import pytest

from lightning_compress.core import Event, EventType


def test_the_index_is_the_step_unless_a_unit_is_named():
    event = Event(EventType.BATCH_START, global_step=15, steps_per_epoch=10, total_steps=60)
    assert event.current_index == 15  # the reference counts epochs as soon as it knows their length
    assert event.in_unit("epoch").current_index == 1.5
    assert event.in_unit("fraction").current_index == 0.25
    assert (event.epoch, event.epoch_full) == (1, 1.5)


def test_positional_order_and_defaults():
    assert Event(EventType.BATCH_END, 3, 6, 9) == Event(
        type_=EventType.BATCH_END, global_step=3, global_batch=6, steps_per_epoch=9
    )
    assert Event().current_index == 0


def test_an_event_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Event().global_step = 3


def test_in_unit_keeps_everything_else():
    event = Event(EventType.BATCH_END, 3, 6, 9, 27, 2)
    assert dataclasses.replace(event.in_unit("epoch"), unit="step") == event
    assert event.in_unit("step") is event


@pytest.mark.parametrize(("unit", "name"), [("epoch", "steps_per_epoch"), ("fraction", "total_steps")])
def test_an_unknown_length_is_an_error_only_after_step_zero(unit, name):
    assert Event(unit=unit).current_index == 0
    with pytest.raises(ValueError, match=rf"unit='{unit}' needs a known {name}.*endless loader.*unit='step'"):
        _ = Event(global_step=1, unit=unit).current_index


def test_epoch_needs_a_length():
    with pytest.raises(ValueError, match="steps_per_epoch"):
        _ = Event(global_step=1).epoch
    with pytest.raises(ValueError, match="steps_per_epoch"):
        _ = Event(global_step=1).epoch_full


def test_whole_epochs_are_whole_numbers():
    """step * (1 / length) is 0.9999... at length 49; a window that ends at epoch 1 would end a step late."""
    for length in range(1, 300):
        assert Event(global_step=length, steps_per_epoch=length, unit="epoch").current_index == 1.0
        assert Event(global_step=3 * length, steps_per_epoch=length).epoch == 3


@pytest.mark.parametrize(
    ("length", "update", "start"), [(7, 0.1, 0), (7, 0.3, 0.5), (10, 0.1, 0), (3, 1 / 3, 1), (49, 1, 2)]
)
def test_an_update_is_due_in_each_step_that_passes_a_point(length, update, start):
    """Against exact fractions. The reference's ``index % update < 1e-10`` misses most points at 7 steps per epoch."""
    begin, every = Fraction(start).limit_denominator(1000), Fraction(update).limit_denominator(1000)
    for step in range(8 * length):
        now, before = Fraction(step, length), Fraction(step - 1, length)
        points = [begin + k * every for k in range(100)]
        expected = any(before < point <= now for point in points)
        event = Event(EventType.BATCH_START, step, steps_per_epoch=length, unit="epoch")
        assert event.should_update(start, None, update) == expected, step


def test_due_count_counts_points():
    assert [Event(global_step=s).due_count(2, 3) for s in range(9)] == [0, 0, 1, 1, 1, 2, 2, 2, 3]


def test_should_update_keeps_to_its_window():
    hits = [s for s in range(12) if Event(global_step=s).should_update(3, 9, 2)]
    assert hits == [3, 5, 7, 9]
    assert [s for s in range(6) if Event(global_step=s).should_update(2, 4, None)] == [2, 3, 4]
    assert all(Event(global_step=s).should_update(None, None, update) for s in range(3) for update in (None, 0.0))
    assert Event().should_update(None, None, 0.5)
    assert Event(unit="epoch").should_update(0, 1, 0.5)


def test_every_event_stands_in_the_docstring():
    import lightning_compress.core.events as module

    places = [module.__doc__.index(event.name) for event in EventType]
    assert places == sorted(places)
