"""A job that is requeued while its model is compressed, played in one process: variables, signal and scontrol."""

import logging
import os
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_compress import CompressionCallback
from tests.support.training_runs import Regression, RoundingModifier, Sums, quiet

pytestmark = pytest.mark.filterwarnings("ignore:.*exists and is not empty")

STEP = {
    "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "compress", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "1", "SLURM_NNODES": "1",
    "SLURM_NTASKS_PER_NODE": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
}  # fmt: skip


@pytest.fixture
def asked(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """The process is a Slurm task; what it asks of scontrol, one line each."""
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\n')
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    former = signal.getsignal(signal.SIGUSR1)
    yield lambda: (folder / "asked").read_text().splitlines() if (folder / "asked").exists() else []
    signal.signal(signal.SIGUSR1, former)


class Killed(RoundingModifier):
    """Slurm signals in the middle of compression, and then kills."""

    dies: bool = True

    def on_calibration_end(self, state, event, **kwargs):
        super().on_calibration_end(state, event, **kwargs)
        os.kill(os.getpid(), signal.SIGUSR1)
        if self.dies:
            raise KeyError("killed")


class Counts(Callback):
    def __init__(self):
        self.batches = 0

    def on_train_batch_end(self, *args):
        self.batches += 1


def rounded(path: Path) -> bool:
    weights = torch.load(path, weights_only=True)["state_dict"]
    return all(set(t.unique().tolist()) <= {0.0, 1.0} for name, t in weights.items() if name.endswith("weight"))


def first_attempt(folder: Path) -> None:
    with pytest.raises(KeyError, match="killed"):
        quiet(folder, CompressionCallback(Killed())).fit(Regression(), Sums())


def test_the_signal_requeues_the_job_and_saves_nothing_half_compressed(tmp_path, asked):
    first_attempt(tmp_path)
    assert asked() == ["requeue 77"]
    assert [path.name for path in tmp_path.glob("hpc_ckpt*")] == ["hpc_ckpt_1.ckpt"]
    assert not rounded(tmp_path / "hpc_ckpt_1.ckpt")


def test_the_next_attempt_goes_on_where_training_had_ended(tmp_path, asked):
    first_attempt(tmp_path)
    module, counts = Regression(), Counts()
    callback = CompressionCallback(Killed(dies=False), allow_recipe_change=True)
    quiet(tmp_path, callback, counts).fit(module, Sums())
    assert counts.batches == 0
    assert callback.done
    assert module.is_rounded()
    assert asked() == ["requeue 77"] * 2  # the second attempt compresses in on_fit_end, and was signalled as well


def test_after_a_requeue_trainer_test_measures_the_compressed_model(tmp_path, asked):
    """Trap 11: with ckpt_path=None Lightning loads the last hpc_ckpt_N, which was the dense model's."""

    class Requeued(Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.save_checkpoint(tmp_path / "hpc_ckpt_4.ckpt")  # as Lightning's handler does in mid-fit

    trainer, module = quiet(tmp_path, CompressionCallback(RoundingModifier()), Requeued()), Regression()
    trainer.fit(module, Sums())
    trainer.test(module, Sums(), verbose=False)
    assert trainer.ckpt_path == str(tmp_path / "hpc_ckpt_5.ckpt")
    assert module.is_rounded()
    another = Regression()
    quiet(tmp_path).test(another, Sums(), verbose=False)
    assert another.is_rounded()


def test_a_job_that_is_killed_after_compression_finds_its_work_done(tmp_path, asked):
    def attempt():
        keeping = ModelCheckpoint(tmp_path / "checkpoints", monitor="val/mse", enable_version_counter=False)
        callback, counts = CompressionCallback(RoundingModifier()), Counts()
        trainer, module = quiet(tmp_path, callback, keeping, counts), Regression()
        trainer.fit(module, Sums())
        return trainer, module, counts

    attempt()
    trainer, module, counts = attempt()
    assert counts.batches == 0
    assert module.is_rounded()
    assert trainer.checkpoint_callback.best_model_path == str(tmp_path / "compressed.ckpt")


def test_an_array_task_is_requeued_by_its_own_id(tmp_path, asked, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    first_attempt(tmp_path)
    assert asked() == ["requeue 70_3"]


def test_without_scontrol_the_run_goes_on_and_says_so(tmp_path, asked, monkeypatch, caplog):
    monkeypatch.setenv("PATH", "/nowhere")
    module = Regression()
    with caplog.at_level(logging.WARNING):
        quiet(tmp_path, CompressionCallback(Killed(dies=False))).fit(module, Sums())
    assert "job 77 could not be requeued, and goes on until its time limit" in caplog.text
    assert module.is_rounded()


def test_lightning_answers_the_signal_again_afterwards(tmp_path, asked):
    seen = []

    class Looks(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(signal.getsignal(signal.SIGUSR1))

        def on_train_end(self, trainer, pl_module):
            seen.append(signal.getsignal(signal.SIGUSR1))

    quiet(tmp_path, CompressionCallback(RoundingModifier()), Looks()).fit(Regression(), Sums())
    assert seen[0] is seen[1]
    assert seen[0] != signal.SIG_DFL


def test_a_handler_of_the_users_own_stays(tmp_path, asked):
    received = []
    signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    quiet(tmp_path, CompressionCallback(Killed(dies=False))).fit(Regression(), Sums())
    assert received == [signal.SIGUSR1]
    assert asked() == []


def test_outside_slurm_nothing_is_saved_for_a_requeue(tmp_path, asked, monkeypatch):
    for name in STEP:
        monkeypatch.delenv(name)
    quiet(tmp_path, CompressionCallback(RoundingModifier())).fit(Regression(), Sums())
    assert not list(tmp_path.glob("hpc_ckpt*"))
