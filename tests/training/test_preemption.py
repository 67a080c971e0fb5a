"""A signal in training, validation or test: what is saved where, and that the run which goes on is the same run."""

import signal

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder

from lightning_compress.training import preemption
from tests.support.preempted_runs import Recorded, Signals, attempts, fit, outcome
from tests.test_kill_resume import differences

MOMENTS = {
    "after a batch": ({"on_train_batch_end": [3]}, {}),
    "after the last batch": ({"on_train_batch_end": [5]}, {}),
    "at the start of a batch": ({"on_train_batch_start": [2]}, {}),
    "at an epoch's end": ({"on_train_epoch_end": [1]}, {}),
    "again and again": ({"on_train_batch_end": [1]}, {}),
    "in validation": ({"on_validation_batch_end": [2]}, {}),
    "in validation inside an epoch": ({"on_validation_batch_end": [1]}, {"val_check_interval": 2}),
    "in the second validation of an epoch": ({"on_validation_batch_end": [9]}, {"val_check_interval": 2}),
    "in the last validation": ({"on_validation_batch_end": [17]}, {}),
    "with accumulated gradients": ({"on_train_batch_end": [2, 4]}, {"accumulate_grad_batches": 3}),
    "one batch per epoch": ({"on_train_batch_end": [1]}, {"limit_train_batches": 1, "limit_val_batches": 0}),
    "in an epoch of one batch, in validation": ({"on_validation_batch_end": [1]}, {"limit_train_batches": 1}),
    "with max_steps": ({"on_train_batch_end": [2]}, {"max_steps": 12, "max_epochs": -1}),
    "in validation, with max_steps": ({"on_validation_batch_end": [2]}, {"max_steps": 10, "max_epochs": -1}),
    "in the last validation, with max_steps": ({"on_validation_batch_end": [10]}, {"max_steps": 10, "max_epochs": -1}),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_run_that_goes_on_ends_with_the_same_bits(tmp_path, slurm, moment, monkeypatch):
    monkeypatch.setattr(preemption, "MOST_CALLS_BETWEEN_QUESTIONS", 1)
    moments, options = MOMENTS[moment]
    fit(tmp_path / "whole", **options)

    def attempt(number):
        again = number == 0 or moment == "again and again"
        fit(tmp_path / "cut", Signals(signal.SIGUSR1, moments if again else {}), **options)

    codes = attempts(attempt)
    assert codes == [143] * len(codes) != []
    assert slurm() == ["requeue 77"] * len(codes)
    assert differences(outcome(tmp_path / "whole"), outcome(tmp_path / "cut")) == []


@pytest.mark.parametrize(
    ("seconds", "cost", "calls"),
    [(0.01, 0.0, 5), (0.2, 0.0, 1), (1e-6, 0.0, 20), (0.02, 0.002, 5), (0.5, 0.01, 1), (0.1, 0.01, 5)],
)
def test_ranks_ask_every_50_ms_or_so_and_not_for_more_than_2_percent_of_the_time(seconds, cost, calls):
    pace = preemption._Pace()
    assert pace.is_due()
    pace.adapt(seconds, cost, 1.0)
    assert [pace.is_due() for _ in range(calls)] == [False] * (calls - 1) + [True]
    assert pace.cost == 1.0


def test_a_signal_in_the_search_for_a_learning_rate_waits_for_the_training(tmp_path, slurm, monkeypatch):
    monkeypatch.setattr(preemption, "MOST_CALLS_BETWEEN_QUESTIONS", 1)

    class Tuned(Recorded):
        lr = 0.01

        def training_step(self, batch, batch_idx):
            if self.global_step == 1 and not list(tmp_path.glob("hpc_ckpt*")):
                signal.raise_signal(signal.SIGUSR1)
            return super().training_step(batch, batch_idx)

    with pytest.raises(SystemExit):
        fit(tmp_path, LearningRateFinder(num_training_steps=4), module=Tuned, num_sanity_val_steps=0)
    saved = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
    assert saved["global_step"] == 1
    assert slurm() == ["requeue 77"]
