"""SIGTERM: the run ends with code 143, nothing half-written stays, and it can be resumed."""

import os
import signal

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_compress import CompressionCallback
from lightning_compress.training import preemption
from tests.support.preempted_runs import Signals
from tests.support.training_runs import Regression, RoundingModifier, Sums, quiet, rounding


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


class InCalibration(RoundingModifier):
    def on_calibration_end(self, state, event, **kwargs):
        terminate()
        super().on_calibration_end(state, event, **kwargs)


def fit(folder, modifier, **options):
    module, keeping = Regression(), ModelCheckpoint(folder / "kept", save_last=True)
    callback = CompressionCallback(modifier, allow_recipe_change=True)
    quiet(folder, callback, keeping, max_epochs=1).fit(module, Sums(), **options)
    return module


def interrupted_in_export(monkeypatch):
    from lightning_compress.export import save as module

    write = module._write

    def terminated(*arguments):
        write(*arguments)
        terminate()
        raise AssertionError("it went on")

    monkeypatch.setattr(module, "_write", terminated)


@pytest.mark.skipif(os.name == "nt", reason="no signals")
@pytest.mark.parametrize("where", ["calibration", "export"])
def test_it_stops_with_nothing_half_written(tmp_path, monkeypatch, where):
    former = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        if where == "export":
            interrupted_in_export(patched)
        with pytest.raises(SystemExit) as caught:
            fit(tmp_path, InCalibration() if where == "calibration" else RoundingModifier())
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == former
    assert (tmp_path / "compressed.ckpt").exists() == (where == "export")
    assert not (tmp_path / "compressed").exists()
    assert not list(tmp_path.rglob(".*"))
    assert fit(tmp_path, RoundingModifier(), ckpt_path=tmp_path / "kept" / "last.ckpt").is_rounded()
    assert (tmp_path / "compressed").exists()


@pytest.mark.skipif(os.name == "nt", reason="no signals")
def test_a_handler_of_the_users_own_stays(tmp_path):
    seen = []
    former = signal.signal(signal.SIGTERM, lambda *_: seen.append("theirs"))
    try:
        with pytest.raises(SystemExit):
            fit(tmp_path, InCalibration())
    finally:
        signal.signal(signal.SIGTERM, former)
    assert seen == ["theirs"]


@pytest.mark.skipif(os.name == "nt", reason="no signals")
def test_in_training_a_checkpoint_is_saved_from_which_it_goes_on(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(preemption, "MOST_CALLS_BETWEEN_QUESTIONS", 1)
    signals = Signals(signal.SIGTERM, {"on_train_batch_start": [3]})
    with pytest.raises(SystemExit) as caught:
        quiet(tmp_path, rounding(), signals, max_epochs=2).fit(Regression(), Sums(batches=8))
    assert caught.value.code == 143
    path = tmp_path / "hpc_ckpt_1.ckpt"
    assert f"SIGTERM: this run ends here; {path} is saved, from which ckpt_path='hpc' goes on" in caplog.text
    assert torch.load(path, weights_only=True)["global_step"] == 3
    callback = rounding()
    quiet(tmp_path, callback, max_epochs=2).fit(Regression(), Sums(batches=8), ckpt_path="hpc")
    assert callback.clock.global_step == 16
    assert callback.done
