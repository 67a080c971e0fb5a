"""A job that is requeued while its model is compressed, played in one process: variables, signal and scontrol."""

import json
import logging
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset

from lightning_compress import CompressionCallback
from tests.support.preempted_runs import Signals
from tests.support.training_runs import Regression, RoundingModifier, Sums, quiet, rounding

pytestmark = pytest.mark.filterwarnings("ignore:.*exists and is not empty")


class Signalled(RoundingModifier):
    """Slurm signals in the middle of compression."""

    signalled: bool = True
    number: int = signal.SIGUSR1

    def on_calibration_end(self, state, event, **kwargs):
        super().on_calibration_end(state, event, **kwargs)
        if self.signalled:
            signal.raise_signal(self.number)


class Counts(Callback):
    def __init__(self):
        self.batches = 0

    def on_train_batch_end(self, *args):
        self.batches += 1


def rounded(path: Path) -> bool:
    weights = torch.load(path, weights_only=True)["state_dict"]
    return all(set(t.unique().tolist()) <= {0.0, 1.0} for name, t in weights.items() if name.endswith("weight"))


def first_attempt(folder: Path, code: int = 143) -> None:
    with pytest.raises(SystemExit) as caught:
        quiet(folder, CompressionCallback(Signalled())).fit(Regression(), Sums())
    assert caught.value.code == code
    assert not (folder / "compressed").exists()


def test_the_signal_requeues_the_job_and_saves_nothing_half_compressed(tmp_path, slurm):
    first_attempt(tmp_path)
    assert slurm() == ["requeue 77"]
    assert [path.name for path in tmp_path.glob("hpc_ckpt*")] == ["hpc_ckpt_1.ckpt"]
    assert not rounded(tmp_path / "hpc_ckpt_1.ckpt")


def test_the_next_attempt_goes_on_where_training_had_ended(tmp_path, slurm):
    first_attempt(tmp_path)
    module, counts = Regression(), Counts()
    callback = CompressionCallback(Signalled(signalled=False), allow_recipe_change=True)
    quiet(tmp_path, callback, counts).fit(module, Sums())
    assert counts.batches == 0
    assert callback.done
    assert module.is_rounded()


@pytest.mark.parametrize(("left", "code"), [(-1, 143), (144, 144)], ids=["slurm", "local executor"])
def test_submitit_requeues_and_the_code_by_which_it_knows_that_is_kept(tmp_path, slurm, left, code):
    received = []

    def handler(number, frame):
        received.append(number)
        sys.exit(left)

    handler.__module__ = "submitit.core.job_environment"
    signal.signal(signal.SIGUSR2, handler)
    with pytest.raises(SystemExit) as caught:
        quiet(tmp_path, CompressionCallback(Signalled(number=signal.SIGUSR2))).fit(Regression(), Sums())
    assert caught.value.code == code
    assert received == [signal.SIGUSR2]
    assert slurm() == []
    assert not rounded(tmp_path / "hpc_ckpt_1.ckpt")


def test_the_signal_is_answered_where_nothing_was_left_to_train(tmp_path, slurm):
    """In on_fit_end, when Lightning's handlers are gone."""
    for _ in range(2):
        first_attempt(tmp_path)
    assert slurm() == ["requeue 77"] * 2


def test_after_a_requeue_trainer_test_measures_the_compressed_model(tmp_path, slurm):
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


def test_a_job_that_is_killed_after_compression_finds_its_work_done(tmp_path, slurm):
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


def test_an_array_task_is_requeued_by_its_own_id(tmp_path, slurm, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    first_attempt(tmp_path)
    assert slurm() == ["requeue 70_3"]


def test_without_scontrol_the_exit_code_asks_the_batch_script(tmp_path, slurm, monkeypatch, caplog):
    monkeypatch.setenv("PATH", "/nowhere")
    with caplog.at_level(logging.WARNING):
        first_attempt(tmp_path, code=138)
    assert "job 77 could not be requeued" in caplog.text
    assert "SIGUSR1: this run ends here" in caplog.text


def test_handlers_are_afterwards_what_they_were(tmp_path, slurm):
    numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
    formers = [signal.getsignal(number) for number in numbers]
    trainer, module = quiet(tmp_path, CompressionCallback(RoundingModifier())), Regression()
    trainer.fit(module, Sums())
    trainer.test(module, Sums(), verbose=False)
    assert [signal.getsignal(number) for number in numbers] == formers


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Sums().rows)


@pytest.mark.parametrize("known", [True, False], ids=["known length", "unknown length"])
def test_in_the_test_the_job_is_requeued_and_nothing_is_saved(tmp_path, slurm, known):
    signals = Signals(signal.SIGUSR1, {"on_test_batch_start": [1]})
    trainer = quiet(tmp_path, CompressionCallback(RoundingModifier()), signals)
    trainer.fit(module := Regression(), Sums())
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(SystemExit) as caught:
        trainer.test(module, Sums() if known else DataLoader(Stream(), 4), verbose=False)
    assert caught.value.code == 143
    assert slurm() == ["requeue 77"]
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_signal_that_no_question_follows_is_for_those_who_come_now(tmp_path, slurm):
    received = []
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    trainer = quiet(tmp_path, CompressionCallback(RoundingModifier()), Signals(signal.SIGTERM, {"on_test_end": [1]}))
    trainer.test(Regression(), Sums(), verbose=False)
    assert received == [signal.SIGTERM] * 2  # as it came, and afterwards


def test_a_handler_of_the_users_own_stays(tmp_path, slurm):
    received = []
    signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    quiet(tmp_path, CompressionCallback(Signalled())).fit(Regression(), Sums())
    assert received == [signal.SIGUSR1]
    assert slurm() == []


def test_outside_slurm_nothing_is_saved_for_a_requeue(tmp_path, slurm, monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    quiet(tmp_path, CompressionCallback(RoundingModifier())).fit(Regression(), Sums())
    assert not list(tmp_path.glob("hpc_ckpt*"))


def test_a_job_that_was_started_again_without_a_checkpoint_replaces_its_own_export(tmp_path, slurm, monkeypatch):
    """Such as one whose script answers the signal itself; another job in that folder is refused as ever."""

    def attempt(job, restarts):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        signal.signal(signal.SIGUSR1, lambda *_: None)
        module, callback = Regression(), rounding()
        quiet(tmp_path, callback).fit(module, Sums())
        return callback.run.name

    first = attempt("77", "0")
    assert not list(tmp_path.glob("hpc_ckpt*"))
    assert attempt("77", "1") == first
    for job, restarts in (("77", "0"), ("78", "1")):
        with pytest.raises(ValueError, match="exists and is not empty: give another export_dir"):
            attempt(job, restarts)
    assert json.loads((tmp_path / "compressed" / "export_manifest.json").read_text())["origin"]["job"] == "77"


class Submitit:
    """Stands for submitit's SignalHandler: rank zero requeues the job and ends its process, with a code of its own."""

    __module__ = "submitit.core.job_environment"
    refuses = False

    def __init__(self):
        self.calls = []

    def checkpoint_and_try_requeue(self, number, frame=None):
        self.calls.append((number, frame))
        if self.refuses:
            raise RuntimeError("Job not requeued because: timed-out too many times.")
        raise SystemExit(-1)


Submitit.checkpoint_and_try_requeue.__module__ = Submitit.__module__


def test_submitit_requeues_after_all_is_saved(tmp_path, slurm):
    handler = Submitit()
    signal.signal(signal.SIGUSR2, handler.checkpoint_and_try_requeue)
    signals = Signals(signal.SIGUSR2, {"on_train_batch_start": [1]})
    with pytest.raises(SystemExit) as caught:
        quiet(tmp_path, rounding(), signals).fit(Regression(), Sums())
    assert caught.value.code == 143
    assert handler.calls == [(signal.SIGUSR2, None)]
    assert torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == 1
    assert signal.getsignal(signal.SIGUSR2) == handler.checkpoint_and_try_requeue
    handler.refuses = True
    with pytest.raises(RuntimeError, match="Job not requeued because"):
        quiet(tmp_path, rounding(), Signals(signal.SIGUSR2, {"on_train_batch_start": [1]})).fit(Regression(), Sums())
    assert slurm() == []
