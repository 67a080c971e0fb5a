"""Stopping and going on: what a checkpoint holds, and that a resumed run is the same run."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from pydantic import PrivateAttr
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from lightning_compress import CompressionCallback, MagnitudePruningModifier, QATModifier
from tests.support.training_runs import RecordingModifier, Regression, RoundingModifier, Sums, quiet

STEP = "SLpPE"


class StopAfter(Callback):
    """What a power cut does."""

    def __init__(self, batches):
        self.batches = batches

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.batches:
            raise KeyError("power cut")


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


# -- finished runs ----------------------------------------------------------------------------------------------------


def test_a_finished_run_that_was_not_compressed_is(tmp_path):
    """A crash in calibration leaves a finished training behind; on_train_end will not come again."""

    class Fails(RoundingModifier):
        def on_calibration_end(self, state, event, **kwargs):
            raise RuntimeError("out of memory")

    keeping = ModelCheckpoint(tmp_path, save_last=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        quiet(tmp_path, CompressionCallback(Fails()), keeping).fit(Regression(), Sums())
    module = Regression()
    callback = CompressionCallback(RoundingModifier(), allow_recipe_change=True)
    quiet(tmp_path, callback).fit(module, Sums(), ckpt_path=tmp_path / "last.ckpt")
    assert callback.done
    assert callback.clock.global_step == 4
    assert module.is_rounded()


def test_a_compressed_run_is_not_compressed_again(tmp_path):
    quiet(tmp_path, CompressionCallback(RoundingModifier())).fit(Regression(), Sums())
    module, modifier = Regression(), RoundingModifier()
    callback = CompressionCallback(modifier)
    trainer = quiet(tmp_path, callback)
    trainer.fit(module, Sums(), ckpt_path=tmp_path / "compressed.ckpt")
    assert callback.done
    assert modifier._seen == []
    assert module.is_rounded()
    assert callback.ledger.rows[0].technique == "rounding"
    assert trainer.checkpoint_callback.best_model_path == str(tmp_path / "compressed.ckpt")  # not the dense one


def test_testing_a_dense_checkpoint_leaves_the_callback_alone(tmp_path):
    keeping = ModelCheckpoint(tmp_path / "dense", save_last=True)
    callback, module = CompressionCallback(RoundingModifier()), Regression()
    trainer = quiet(tmp_path, callback, keeping)
    trainer.fit(module, Sums())
    trainer.test(module, Sums(), ckpt_path=tmp_path / "dense" / "last.ckpt", verbose=False)
    assert callback.done
    assert not module.is_rounded()


# -- what a checkpoint holds ------------------------------------------------------------------------------------------


def test_the_checkpoint_has_dense_keys_and_plain_state(tmp_path):
    module = Regression()
    dense = list(module.state_dict())
    quiet(tmp_path, CompressionCallback(RoundingModifier())).fit(module, Sums())
    saved = torch.load(tmp_path / "compressed.ckpt", weights_only=True)
    assert list(saved["state_dict"]) == dense
    kept = saved["callbacks"]["CompressionCallback"]
    assert kept["done"] is True
    assert kept["clock"] == {"steps": [4], "batches": 4}
    assert list(kept["modifiers"]) == ["RoundingModifier"]
    assert Regression.load_from_checkpoint(tmp_path / "compressed.ckpt").is_rounded()


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


def test_an_export_of_an_earlier_end_of_the_run_is_not_taken_for_this_one(tmp_path):
    """Killed after compressed.ckpt of the second end, before its export: the export of the first end is still there."""

    def fit(epochs, **options):
        callback, module = CompressionCallback(RoundingModifier()), Regression()
        quiet(tmp_path, callback, ModelCheckpoint(tmp_path / "kept", save_last=True), max_epochs=epochs).fit(
            module, Sums(), **options
        )

    last = tmp_path / "kept" / "last.ckpt"
    fit(1)
    shutil.copytree(tmp_path / "compressed", tmp_path / "first")
    fit(2, ckpt_path=last)
    second = (tmp_path / "compressed" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "compressed")
    shutil.copytree(tmp_path / "first", tmp_path / "compressed")
    (tmp_path / "compressed" / "model.safetensors").write_bytes(b"of the first end")
    fit(2, ckpt_path=last)
    assert (tmp_path / "compressed" / "model.safetensors").read_bytes() == second


def test_training_a_plain_module_is_untouched_by_a_sleeping_modifier(tmp_path):
    def weights(*callbacks):
        torch.manual_seed(0)
        module = Regression()
        quiet(tmp_path, *callbacks, max_epochs=2, enable_checkpointing=False).fit(module, Sums(shuffle=False))
        return nn.utils.parameters_to_vector(module.parameters())

    assert torch.equal(weights(), weights(CompressionCallback(RecordingModifier(start=100))))


@pytest.mark.parametrize("stateful", [False, True])
def test_batches_that_a_loader_without_a_state_repeats_are_named(tmp_path, stateful):
    class Counting(DataLoader):
        state_dict = lambda self: {}  # noqa: E731
        load_state_dict = lambda self, state: None  # noqa: E731

    def fit(*callbacks, **options):
        kept = ModelCheckpoint(tmp_path / "kept", save_last=True, every_n_train_steps=1)
        callback = CompressionCallback(RoundingModifier(data=False), evaluate=False)
        loader = (Counting if stateful else DataLoader)(Sums().rows, 4)
        quiet(tmp_path, kept, callback, *callbacks).fit(Regression(), loader, **options)

    with pytest.raises(KeyError, match="power cut"):
        fit(StopAfter(3))  # the checkpoint is that of step 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(ckpt_path=tmp_path / "kept" / "last.ckpt")
    told = [str(w.message) for w in caught if "begins the epoch anew, so that 2 batches come again" in str(w.message)]
    assert len(told) == (not stateful)
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert summary.get("batches_repeated_on_resume") == (None if stateful else 2)


DAMAGE = [{"clock": None}, {"modifiers": []}, {"recipe": 3}, {"ledger": [3]}, {"done": ...}]


@pytest.mark.parametrize("damage", DAMAGE, ids=str)
def test_a_state_that_is_not_ours_is_one_clear_error(damage):
    callback = CompressionCallback(RoundingModifier())
    state = callback.state_dict()
    for key, value in damage.items():
        if value is ...:
            del state[key]
        else:
            state[key] = value
    with pytest.raises(ValueError, match="a state of CompressionCallback that cannot be read"):
        CompressionCallback(RoundingModifier()).load_state_dict(state)


def test_a_checkpoint_of_unfinished_training_says_what_it_lacks_in_a_new_process(tmp_path, recwarn):
    def callback(start):
        return CompressionCallback(QATModifier(scheme="W4A16", group_size=8, start=start))

    for start in (0, 99):
        folder = tmp_path / str(start)
        keeping = ModelCheckpoint(folder / "kept", save_last=True)
        quiet(folder, callback(start), keeping).fit(Regression(), Sums())
        recwarn.clear()
        trainer = quiet(folder / "fresh", callback(start))
        trainer.test(Regression(), Sums(), ckpt_path=folder / "kept" / "last.ckpt", verbose=False)
        told = [str(w.message) for w in recwarn if "has not compressed its model yet" in str(w.message)]
        assert len(told) == (start == 0)
        assert all("without what QATModifier makes of them; resume the run" in text for text in told)


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
