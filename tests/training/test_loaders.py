"""Calibration batches: which, how many, and on which device they are augmented."""

import pytest
import torch
from torch.utils.data import DataLoader

from tests.support.training_runs import Regression, Sums, quiet, rounding


def indices(callback):
    """The first column of a row is its index."""
    return [sorted(round(v) for v in batch[:, 0].tolist()) for batch in callback.lifecycle.modifiers[0]._seen]


def test_samples_are_chosen_with_the_seed(tmp_path, caplog):
    chosen = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)  # the training loader shuffles differently each time
        callback = rounding(calibration_batches=2, seed=seed)
        with caplog.at_level("INFO"):
            quiet(tmp_path / str(number), callback).fit(Regression(), Sums(batches=8))
        chosen.append(indices(callback))
    assert chosen[0] == chosen[1] != chosen[2]
    flat = [i for batch in chosen[0] for i in batch]
    assert flat == sorted(flat)
    assert len(set(flat)) == 8
    assert f"8 of 32 samples, chosen with seed 0, in order: {flat[0]}, {flat[1]}" in caplog.text


def test_the_datamodule_may_bring_its_calibration_loader(tmp_path):
    class Own(Sums):
        def calibration_dataloader(self):
            return DataLoader(self.rows, 2)

    callback = rounding(calibration_batches=3)
    quiet(tmp_path, callback).fit(Regression(), Own())
    assert indices(callback) == [[0, 1], [2, 3], [4, 5]]


def test_the_module_may_bring_its_calibration_step(tmp_path):
    steps = []

    class Own(Regression):
        def calibration_step(self, batch, batch_idx):
            steps.append((batch_idx, len(batch[0])))
            return self.model(batch[0])

    quiet(tmp_path, rounding(calibration_batches=3)).fit(Own(), Sums())
    assert {(i, 4) for i in (0, 1, 2)} <= set(steps) <= {(i, 4) for i in (0, 1, 2)} | {(0, 1)}  # (0, 1): the probe


def test_fewer_batches_than_asked_is_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="calibration_batches=16, but the loader gave 4"):
        quiet(tmp_path, rounding()).fit(Regression(), Sums())


def test_an_empty_loader_is_an_error(tmp_path):
    class Empty(Sums):
        def calibration_dataloader(self):
            return DataLoader([], 2)

    with pytest.raises(ValueError, match="the calibration loader is empty"):
        quiet(tmp_path, rounding()).fit(Regression(), Empty())


def test_augmentation_on_the_device_is_off_while_calibrating(tmp_path):
    class Augments(Sums):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] + 1000, batch[1]] if self.trainer.training else batch

    callback = rounding()
    quiet(tmp_path, callback).fit(Regression(), Augments())
    assert max(max(batch) for batch in indices(callback)) < 1000
