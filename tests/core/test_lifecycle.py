"""Order of events, several modifiers, failures, pausing, checkpoints."""

import itertools

import pytest
import torch
from torch import nn

from lightning_compress.core import Event, EventType, Lifecycle, Modifier, State
from lightning_compress.core.lifecycle import modifiers_in_order

E = EventType


@pytest.fixture
def lifecycle(recording):
    made = Lifecycle([recording(start=0)])
    made.initialize(State())
    return made


def send(lifecycle, *types):
    for type_ in types:
        lifecycle.emit(State(), Event(type_))


# -- what a recipe may be --------------------------------------------------------------------------------------------


def test_no_modifiers():
    with pytest.raises(ValueError, match="no modifiers: expected at least one"):
        Lifecycle([])


def test_something_else_than_a_modifier(recording):
    with pytest.raises(ValueError, match="expected a Modifier, got str: 'gptq_w4'"):
        Lifecycle([recording(), "gptq_w4"])


def test_one_object_twice(recording):
    modifier = recording()
    with pytest.raises(ValueError, match="the same modifier object is in the recipe twice; create two"):
        Lifecycle([modifier, modifier])


def test_two_modifiers_of_one_class(recording, train):
    """A recipe of the reference keeps only one of a class in each group."""
    one, two = recording(start=1), recording(start=3)
    lifecycle = Lifecycle([one, two])
    lifecycle.initialize(State())
    train(lifecycle, 0, 4)
    assert one.indices("start") == [1]
    assert two.indices("start") == [3]
    assert lifecycle.keys() == ["RecordingModifier", "RecordingModifier#2"]


def test_keys_tell_groups_and_doubles_apart(recording):
    modifiers = [recording(), recording(group="mlp"), recording(), recording(group="mlp")]
    assert Lifecycle(modifiers).keys() == [
        "RecordingModifier", "RecordingModifier[mlp]", "RecordingModifier#2", "RecordingModifier[mlp]#2",
    ]  # fmt: skip


# -- order -----------------------------------------------------------------------------------------------------------


def test_events_reach_modifiers_in_recipe_order(recording):
    order = []

    class Ordered(recording):
        def on_event(self, state, event, **kwargs):
            order.append((self.index, kwargs))

    lifecycle = Lifecycle([Ordered(index=i) for i in (2, 0, 1)])
    lifecycle.initialize(State())
    lifecycle.emit(State(), Event(E.BATCH_START), extra="x")
    assert order == [(2, {"extra": "x"}), (0, {"extra": "x"}), (1, {"extra": "x"})]
    lifecycle.emit(State(), Event(E.BATCH_END), only=lifecycle.modifiers[1:2])
    assert order[3:] == [(0, {})]


@pytest.mark.parametrize(
    "types",
    [
        "BATCH_START LOSS_CALCULATED OPTIM_PRE_STEP OPTIM_POST_STEP BATCH_END BATCH_START",
        "BATCH_START LOSS_CALCULATED BATCH_END BATCH_START",  # gradients accumulate
        "BATCH_START BATCH_END",  # training_step gave None
        "BATCH_START LOSS_CALCULATED OPTIM_PRE_STEP BATCH_END",  # AMP skipped the step
        "BATCH_START LOSS_CALCULATED OPTIM_PRE_STEP OPTIM_POST_STEP "
        "LOSS_CALCULATED OPTIM_PRE_STEP OPTIM_POST_STEP BATCH_END",  # two optimizers
        "BATCH_START LOSS_CALCULATED LOSS_CALCULATED OPTIM_PRE_STEP OPTIM_POST_STEP BATCH_END",  # two backward passes
        "CALIBRATION_START BLOCK_END CALIBRATION_END",
        "CALIBRATION_START MODULE_READY MODULE_READY BLOCK_END MODULE_READY BLOCK_END CALIBRATION_END",
        "CALIBRATION_START BLOCK_SURVEYED BLOCK_SURVEYED MODULE_READY BLOCK_END BLOCK_END CALIBRATION_END",
        "CALIBRATION_START CALIBRATION_END CALIBRATION_START",
        "BATCH_START BATCH_END CALIBRATION_START CALIBRATION_END",
        "TRAINING_END CALIBRATION_START BLOCK_END CALIBRATION_END",  # nothing was trained
        "BATCH_START BATCH_END TRAINING_END CALIBRATION_START CALIBRATION_END",
        "CALIBRATION_START CALIBRATION_END TRAINING_END",  # a modifier handed over before the first batch
    ],
)
def test_orders_that_happen(lifecycle, types):
    send(lifecycle, *(E[name] for name in types.split()))


@pytest.mark.parametrize(
    ("types", "last", "wrong"),
    [
        ("BATCH_START BATCH_START", "BATCH_START", "BATCH_START"),
        ("BATCH_END", "nothing", "BATCH_END"),  # the reference accepts this one,
        ("LOSS_CALCULATED", "nothing", "LOSS_CALCULATED"),
        ("BATCH_START OPTIM_POST_STEP", "BATCH_START", "OPTIM_POST_STEP"),
        ("BATCH_START BATCH_END OPTIM_PRE_STEP", "BATCH_END", "OPTIM_PRE_STEP"),
        ("BATCH_START CALIBRATION_START", "BATCH_START", "CALIBRATION_START"),
        ("CALIBRATION_END", "nothing", "CALIBRATION_END"),  # and this,
        ("BLOCK_END", "nothing", "BLOCK_END"),  # and this
        ("CALIBRATION_START MODULE_READY CALIBRATION_END", "MODULE_READY", "CALIBRATION_END"),
        ("CALIBRATION_START BLOCK_END BLOCK_SURVEYED", "BLOCK_END", "BLOCK_SURVEYED"),
        ("CALIBRATION_START BATCH_START", "CALIBRATION_START", "BATCH_START"),
        ("TRAINING_END TRAINING_END", "TRAINING_END", "TRAINING_END"),  # it comes once
        ("TRAINING_END BATCH_START", "TRAINING_END", "BATCH_START"),
        ("BATCH_START TRAINING_END", "BATCH_START", "TRAINING_END"),
        ("CALIBRATION_START TRAINING_END", "CALIBRATION_START", "TRAINING_END"),
    ],
)
def test_an_order_that_cannot_be_names_both_events(lifecycle, types, last, wrong):
    *fine, broken = (E[name] for name in types.split())
    send(lifecycle, *fine)
    with pytest.raises(ValueError, match=f"event {wrong} after {last}: expected it after "):
        send(lifecycle, broken)


def test_training_goes_on_after_calibration(lifecycle):
    send(lifecycle, E.CALIBRATION_START, E.CALIBRATION_END, E.BATCH_START, E.BATCH_END)


@pytest.mark.parametrize("type_", [E.INITIALIZE, E.FINALIZE, None])
def test_initialize_and_finalize_are_methods(lifecycle, type_):
    with pytest.raises(ValueError, match=r"is not emitted; call initialize\(\) or finalize\(\)"):
        lifecycle.emit(State(), Event(type_))


def test_an_event_before_initialize(recording):
    with pytest.raises(RuntimeError, match="RecordingModifier got batch_start before it was initialized"):
        Lifecycle([recording()]).emit(State(), Event(E.BATCH_START))


def test_a_batch_may_be_skipped_when_no_modifier_acts(recording, train):
    """Closed windows cost nothing; whoever overrides what decides about events is always asked."""

    class Listening(recording):
        def on_event(self, state, event, **kwargs):
            pass

    class Deciding(recording):
        def should_start(self, event):
            return event.global_step >= 3

    assert not Lifecycle([recording(), recording(start=2)]).acting
    for cls in (Listening, Deciding):
        assert Lifecycle([recording(), cls()]).acting
    window = Lifecycle([recording(start=1, end=3)])
    window.initialize(State())
    seen = []
    for step in range(4):
        train(window, step, step + 1)
        seen.append(window.acting)
    assert seen == [False, True, False, False]
    send(window, E.BATCH_START)
    window.skip_batch()
    send(window, E.BATCH_START, E.BATCH_END)


# -- failures --------------------------------------------------------------------------------------------------------


def test_one_that_cannot_initialize_takes_the_hooks_of_all_off(recording):
    layer = nn.Linear(2, 2)

    class Hooking(recording):
        def on_initialize(self, state, **kwargs):
            self.hook(layer, lambda *args: None)
            return True

    lifecycle = Lifecycle([Hooking(), recording(answer=False), recording()])
    with pytest.raises(RuntimeError, match=r"RecordingModifier\.on_initialize returned False"):
        lifecycle.initialize(State())
    assert not layer._forward_pre_hooks
    assert not lifecycle.initialized
    assert lifecycle.modifiers[2].handlers == []


def test_one_that_cannot_finalize_takes_the_hooks_of_all_off(recording):
    layer = nn.Linear(2, 2)

    class Late(recording):
        def on_finalize(self, state, **kwargs):
            raise OSError("disk full")

    late, after = Late(), recording()
    lifecycle = Lifecycle([late, after])
    lifecycle.initialize(State())
    after.hook(layer, lambda *args: None)
    with pytest.raises(OSError, match="disk full"):
        lifecycle.finalize(State())
    assert not layer._forward_pre_hooks
    assert not lifecycle.finalized


def test_abort_in_the_middle_of_a_batch(lifecycle):
    layer = nn.Linear(2, 2)
    lifecycle.modifiers[0].hook(layer, lambda *args: None)
    send(lifecycle, E.BATCH_START, E.LOSS_CALCULATED)
    lifecycle.abort()
    assert not layer._forward_pre_hooks
    send(lifecycle, E.BATCH_START)  # a new batch may begin


def test_initialized_and_finalized_mean_all(recording):
    lifecycle = Lifecycle([recording(), recording()])
    lifecycle.modifiers[0].initialize(State())
    assert not lifecycle.initialized
    lifecycle.modifiers[1].initialize(State())
    assert lifecycle.initialized
    assert not lifecycle.finalized
    lifecycle.finalize(State())
    assert lifecycle.finalized


# -- pausing ---------------------------------------------------------------------------------------------------------


def test_pausing_all_nests(recording):
    """In the reference, leaving the inner pause wakes hooks that the outer one still holds."""
    one, two, layer, calls = recording(), recording(), nn.Linear(2, 2), []
    lifecycle = Lifecycle([one, two])
    for modifier in (one, two):
        modifier.hook(layer, lambda *args: calls.append(1))
    with lifecycle.paused():
        with lifecycle.paused(), one.paused():
            layer(torch.ones(1, 2))
        layer(torch.ones(1, 2))
        assert calls == []
    layer(torch.ones(1, 2))
    assert calls == [1, 1]


def test_the_token_mask_reaches_every_modifier(recording):
    one, two = recording(), recording()
    lifecycle, mask = Lifecycle([one, two]), torch.tensor([[True, False]])
    lifecycle.set_token_mask(mask)
    assert one.token_mask is mask
    assert two.token_mask is mask
    lifecycle.set_token_mask(None)
    assert one.token_mask is None


# -- checkpoints -----------------------------------------------------------------------------------------------------


def test_state_of_a_run_cut_anywhere(recording, train, tmp_path):
    """Two modifiers of one class; cut after each step, the two pieces do what the whole run does."""

    def recipe():
        return Lifecycle([recording(start=1, end=5, update=2), recording(start=0, update=3)])

    whole = recipe()
    whole.initialize(State())
    train(whole, 0, 8)
    expected = [modifier.indices("update") for modifier in whole.modifiers]
    for cut in range(1, 8):
        first, second = recipe(), recipe()
        for lifecycle in (first, second):
            lifecycle.initialize(State())
        train(first, 0, cut)
        torch.save(first.state_dict(), tmp_path / "state.pt")
        second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        train(second, cut, 8)
        pieces = zip(first.modifiers, second.modifiers, strict=True)
        assert [a.indices("update") + b.indices("update") for a, b in pieces] == expected, cut


def test_another_recipe_than_the_checkpoint_has(recording):
    class Other(recording):
        pass

    saved = Lifecycle([recording()]).state_dict()
    message = r"written with the modifiers \['RecordingModifier'\], this recipe has \['Other'\]; resume with the recipe"
    with pytest.raises(ValueError, match=message):
        Lifecycle([Other()]).load_state_dict(saved)


def test_each_pair_of_training_events_is_judged(recording):
    """The whole table: what may follow what, counted."""
    training = [E.BATCH_START, E.LOSS_CALCULATED, E.OPTIM_PRE_STEP, E.OPTIM_POST_STEP, E.BATCH_END]
    allowed = set()
    for before, after in itertools.product([None, *training], training):
        lifecycle = Lifecycle([recording()])
        lifecycle.last = before
        try:
            lifecycle.check_order(after)
        except ValueError:
            continue
        allowed.add((before, after))
    inside = training[1:4]
    expected = {(None, E.BATCH_START), (E.BATCH_END, E.BATCH_START), (E.OPTIM_PRE_STEP, E.OPTIM_POST_STEP)}
    expected |= {(a, b) for a in [E.BATCH_START, *inside] for b in (E.LOSS_CALCULATED, E.OPTIM_PRE_STEP, E.BATCH_END)}
    assert allowed == expected


def test_modifiers_come_as_one_several_or_by_name_in_order():
    assert modifiers_in_order("gptq_w4") == ["gptq_w4"]  # refused by Lifecycle, which names its type
    assert modifiers_in_order(Modifier) == [Modifier]
    assert modifiers_in_order({"b": 2, "a": 1}) == [2, 1]
    assert modifiers_in_order(number for number in (3, 4)) == [3, 4]
    assert modifiers_in_order(None) == [None]
