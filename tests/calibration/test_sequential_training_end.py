"""TRAINING_END: once, before calibration, with the model as in calibration, and no walk where nothing calibrates."""

import pytest
import torch
from pydantic import PrivateAttr
from torch import nn

from lightning_compress import MagnitudePruningModifier, RotationModifier, compress
from lightning_compress.calibration import sequential
from lightning_compress.calibration.sequential import end_training
from lightning_compress.core import Event, Lifecycle, Modifier, Needs, State
from tests.support.calibration_models import C, Layered, LockstepWatcher, Watcher, make_batches, seeded, started


class Ending(Modifier):
    """Writes down what it finds."""

    _seen: list = PrivateAttr(default_factory=list)

    def on_initialize(self, state, **kwargs):
        return True

    def on_training_end(self, state, event, **kwargs):
        self._seen.append((event.global_step, state.model.training, torch.is_grad_enabled()))


class Counting(Ending):
    """The events that reach it."""

    def on_event(self, state, event, **kwargs):
        self._seen.append(event.type_.name)

    def on_training_end(self, state, event, **kwargs):
        self._seen.append("handler")


def test_the_model_is_as_in_calibration_and_afterwards_as_before():
    model, modifier = seeded(Layered).train(), Ending()
    end_training(*started(modifier, model=model), Event(global_step=7))
    assert modifier._seen == [(7, False, False)]
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


def test_weights_that_are_not_finite_are_refused_only_where_a_handler_works_on_them():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or Inf in the weights \['0.weight'\]"):
        end_training(*started(Ending(), model=model))

    class Listening(Modifier):
        def on_initialize(self, state, **kwargs):
            return True

    lifecycle, state = started(Listening(), model=model)
    end_training(lifecycle, state)
    assert lifecycle.last == "training_end"


def test_it_comes_once_and_before_calibration():
    before, watcher = Counting(), LockstepWatcher(targets=["Linear"])
    compress(seeded(Layered), [before, watcher], make_batches(1, 2, 5, C))
    assert before._seen[:3] == ["TRAINING_END", "handler", "CALIBRATION_START"]
    assert before._seen.count("TRAINING_END") == before._seen.count("handler") == 1
    assert [name for name, _ in watcher.events][:2] == ["TRAINING_END", "CALIBRATION_START"]


def test_where_nothing_calibrates_no_block_is_walked_and_no_batch_is_run():
    counting, model, progress = Counting(), seeded(Layered), []
    model.register_forward_pre_hook(lambda *_: pytest.fail("a batch was run"))
    modifiers = [counting, MagnitudePruningModifier(final_sparsity=0.5)]
    compress(model, modifiers, make_batches(1, 2, 5, C), progress=lambda *now: progress.append(now))
    assert counting._seen == ["TRAINING_END", "handler"]
    assert progress == []
    assert (model.head.weight == 0).float().mean() == 0.5


@pytest.mark.parametrize("place", [0, 1])
def test_pruning_comes_before_calibration_whatever_its_place_in_the_recipe(place):
    watcher = Watcher(targets=["re:layers.0.q"], change=False)
    recipe = [watcher]
    recipe.insert(place, MagnitudePruningModifier(targets=["embed"], final_sparsity=0.5))
    model, batches = seeded(Layered), make_batches(1, 2, 5, C)
    compress(model, recipe, batches)
    assert torch.equal(watcher.inputs["layers.0.q"][0], model.embed(batches[0]))


def test_two_passes_stay_where_a_modifier_acts_at_the_end_of_training(caplog):
    """As long as nobody asks for one: results do not depend on which event a modifier acts at."""
    for walk, events in (("auto", 0), ("one_pass", 1)):
        watcher = LockstepWatcher(targets=["Linear"])
        compress(seeded(Layered), [Ending(), watcher], make_batches(1, 2, 5, C), walk=walk)
        assert ("MODULE_READY" in {name for name, _ in watcher.events}) == bool(events)


def test_a_modifier_that_acts_only_then_has_no_window():
    with pytest.raises(ValueError, match="Ending: start=1 would do nothing"):
        Ending(start=1)
    assert RotationModifier().needs == Needs(one_pass=True, team="weights")
    assert RotationModifier(learn=True).needs.data


def test_experts_of_a_mixture_are_linears_then(monkeypatch):
    calls = []
    original = sequential.split_while
    monkeypatch.setattr(sequential, "split_while", lambda model: calls.append(model) or original(model))
    model = seeded(Layered)
    lifecycle, state = Lifecycle([Ending()]), State(model=model)
    lifecycle.initialize(state)
    end_training(lifecycle, state)
    assert calls == [model]
