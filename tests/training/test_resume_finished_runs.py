"""Runs that have ended and are resumed."""

import shutil

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint

from lightning_compress import CompressionCallback
from tests.support.training_runs import Regression, RoundingModifier, Sums, quiet, rounding


def test_the_learning_rate_finder_is_no_resumed_run(tmp_path):
    class Tunable(Regression):
        lr = 0.01

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    (tmp_path / "compressed").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "compressed" / name).touch()
    with pytest.raises(ValueError, match="exists and is not empty"):
        quiet(tmp_path, LearningRateFinder(num_training_steps=3), rounding()).fit(Tunable(), Sums())
    callback, module = rounding(export_dir=str(tmp_path / "other")), Tunable()
    quiet(tmp_path, LearningRateFinder(num_training_steps=3), callback).fit(module, Sums())
    assert callback.clock.global_step == 4
    assert module.is_rounded()


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
