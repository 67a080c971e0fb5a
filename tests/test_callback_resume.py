"""Stopping and going on: what a checkpoint holds, and that a resumed run is the same run."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from pydantic import PrivateAttr
from safetensors.torch import load_file
from torch import nn

from lightning_compress import CompressionCallback, MagnitudePruningModifier
from tests.support.training_runs import RecordingModifier, Regression, RoundingModifier, StopAfter, Sums, quiet

STEP = "SLpPE"


def interrupted(folder, modifier, after=3, **options):
    """Fit until the cut; the path of the last checkpoint, which was saved after every step."""
    keeping = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1)
    with pytest.raises(KeyError, match="power cut"):
        quiet(folder, CompressionCallback(modifier), keeping, StopAfter(after + 1), max_epochs=2, **options).fit(
            Regression(), Sums(shuffle=False)
        )
    return folder / "last.ckpt"


@pytest.mark.parametrize("after", [3, 4, 6], ids=["in the epoch", "between epochs", "in the last epoch"])
def test_a_resumed_run_goes_on_where_it_stopped(tmp_path, after):
    path = interrupted(tmp_path, RecordingModifier(start=0), after)
    modifier = RecordingModifier(start=0)
    callback = CompressionCallback(modifier)
    quiet(tmp_path, callback, max_epochs=2).fit(Regression(), Sums(shuffle=False), ckpt_path=path, weights_only=True)
    assert modifier._events[0] == ("BATCH_START", after, after)
    assert modifier.batches == [STEP] * (8 - after)
    assert callback.clock.global_step == callback.clock.batches == 8
    assert callback.clock.total_steps == 8
    assert callback.done


def test_who_enters_past_the_start_starts_at_the_first_batch(tmp_path):
    path = interrupted(tmp_path, RecordingModifier())
    modifier = RecordingModifier(start=2)
    callback = CompressionCallback(modifier, allow_recipe_change=True)
    quiet(tmp_path, callback, max_epochs=2).fit(Regression(), Sums(), ckpt_path=path)
    assert modifier._calls == ["initialize", "start at 3", "finalize"]


def test_a_window_that_is_over_stays_over(tmp_path):
    path = interrupted(tmp_path, RecordingModifier(start=1, end=2))
    modifier = RecordingModifier(start=1, end=2)
    quiet(tmp_path, CompressionCallback(modifier), max_epochs=2).fit(Regression(), Sums(), ckpt_path=path)
    assert not [call for call in modifier._calls if "at" in call.split()]


def test_modifiers_take_back_their_state(tmp_path):
    class Remembers(RecordingModifier):
        _seen: torch.Tensor = PrivateAttr(default_factory=lambda: torch.zeros(1))

        def on_event(self, state, event, **kwargs):
            self._seen += event.type_ == "batch_end"

        def state_dict(self):
            return super().state_dict() | {"seen": self._seen}

        def load_state_dict(self, state):
            super().load_state_dict(state)
            self._seen = state["seen"]

    path = interrupted(tmp_path, Remembers())
    modifier = Remembers()
    callback = CompressionCallback(modifier)
    quiet(tmp_path, callback, max_epochs=2).fit(Regression(), Sums(), ckpt_path=path, weights_only=True)
    assert modifier._seen == 8


def test_testing_a_dense_checkpoint_leaves_the_callback_alone(tmp_path):
    keeping = ModelCheckpoint(tmp_path / "dense", save_last=True)
    callback, module = CompressionCallback(RoundingModifier()), Regression()
    trainer = quiet(tmp_path, callback, keeping)
    trainer.fit(module, Sums())
    trainer.test(module, Sums(), ckpt_path=tmp_path / "dense" / "last.ckpt", verbose=False)
    assert callback.done
    assert not module.is_rounded()


# -- what a checkpoint holds ------------------------------------------------------------------------------------------


def test_state_that_weights_only_could_not_read_is_named():
    class Careless(RecordingModifier):
        def state_dict(self):
            return super().state_dict() | {"where": [Path("x")]}

    with pytest.raises(TypeError, match=r"\['modifiers'\]\['Careless'\]\['where'\]\[0\] is a PosixPath"):
        CompressionCallback(Careless()).state_dict()


def test_two_callbacks_do_not_go_together(tmp_path):
    with pytest.raises(RuntimeError, match="more than one stateful callback of type .CompressionCallback"):
        quiet(tmp_path, CompressionCallback(RecordingModifier()), CompressionCallback(RecordingModifier()))


# -- a changed recipe -------------------------------------------------------------------------------------------------


def test_a_changed_recipe_is_shown(tmp_path):
    path = interrupted(tmp_path, RecordingModifier(start=1, end=5))
    callback = CompressionCallback([RecordingModifier(start=2, end=5), RoundingModifier()])
    trainer = quiet(tmp_path, callback, max_epochs=2)
    with pytest.raises(ValueError, match="the recipe differs") as caught:
        trainer.fit(Regression(), Sums(), ckpt_path=path)
    assert "modifiers.RecordingModifier.start: 1.0 -> 2.0" in str(caught.value)
    assert "modifiers.RoundingModifier.type: 'absent' -> 'RoundingModifier'" in str(caught.value)
    assert "end" not in str(caught.value).split("resume")[0]
    assert "allow_recipe_change=True" in str(caught.value)


def test_a_changed_recipe_can_be_allowed(tmp_path):
    path = interrupted(tmp_path, RecordingModifier(start=1))
    one, two = RecordingModifier(start=1), RoundingModifier()
    callback, module = CompressionCallback([one, two], allow_recipe_change=True), Regression()
    quiet(tmp_path, callback, max_epochs=2).fit(module, Sums(), ckpt_path=path)
    assert callback.clock.global_step == 8
    assert module.is_rounded()


def exported_weights(folder):
    return load_file(folder / "model.safetensors")["0.weight"]


def test_only_what_the_same_run_exported_before_is_replaced(tmp_path):
    """A run that goes on with more epochs writes into the same folder, and another run's checkpoint does not."""

    def fit(folder, epochs=1, **options):
        callback = CompressionCallback(RecordingModifier(), export_dir=options.pop("export_dir", None))
        keeping = ModelCheckpoint(folder / "kept", save_last=True)
        quiet(folder, callback, keeping, max_epochs=epochs).fit(Regression(), Sums(), **options)
        return exported_weights(folder / "compressed")

    one, two = tmp_path / "one", tmp_path / "two"
    first = fit(one)
    with pytest.raises(ValueError, match="exists and is not empty: give another export_dir"):
        fit(one)
    more = fit(one, 2, ckpt_path=one / "kept" / "last.ckpt")
    assert not torch.equal(first, more)
    fit(two)
    with pytest.raises(ValueError, match=r"one/compressed was not written by this run, so that it is not replaced"):
        fit(one, 2, ckpt_path=two / "kept" / "last.ckpt")
    assert torch.equal(exported_weights(one / "compressed"), more)
    (one / "compressed" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"one/compressed holds notes.txt, which this package did not write"):
        fit(one, 3, ckpt_path=one / "kept" / "last.ckpt")
    assert torch.equal(exported_weights(one / "compressed"), more)


def test_training_a_plain_module_is_untouched_by_a_sleeping_modifier(tmp_path):
    def weights(*callbacks):
        torch.manual_seed(0)
        module = Regression()
        quiet(tmp_path, *callbacks, max_epochs=2, enable_checkpointing=False).fit(module, Sums(shuffle=False))
        return nn.utils.parameters_to_vector(module.parameters())

    assert torch.equal(weights(), weights(CompressionCallback(RecordingModifier(start=100))))


def test_a_tuner_before_the_fit_changes_no_bit_of_it(tmp_path):
    class Tunable(Regression):
        lr = 0.05

    weights = []
    for tuned in (False, True):
        torch.manual_seed(0)
        module, pruning = Tunable(), MagnitudePruningModifier(final_sparsity=0.5, start=0, end=8)
        trainer = quiet(tmp_path / str(tuned), CompressionCallback(pruning, evaluate=False), max_epochs=3)
        if tuned:
            Tuner(trainer).lr_find(module, Sums(), num_training=5)
        torch.manual_seed(1)
        trainer.fit(module, Sums())
        weights.append(module.model[0].weight.detach().clone())
    assert torch.equal(*weights)
