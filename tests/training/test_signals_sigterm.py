"""SIGTERM after training: the run ends at once with code 143, nothing half-written stays, and it can be resumed."""

import os
import signal
import time
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_compress import CompressionCallback
from tests.support.training_runs import Regression, RoundingModifier, Sums, quiet
from tests.support.two_ranks import run_two_ranks


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
def test_it_stops_there_and_then(tmp_path, monkeypatch, where):
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


class InCalibrationOfAll(RoundingModifier):
    folder: str

    def on_calibration_end(self, state, event, **kwargs):
        os.kill(int(Path(self.folder, "rank 1").read_text()), signal.SIGTERM)
        time.sleep(0.5)
        terminate()
        raise AssertionError("it went on")


@pytest.mark.skipif(os.name == "nt", reason="no signals")
def test_two_ranks_stop_with_that_code_and_without_a_hang(tmp_path):
    def work(rank):
        (tmp_path / f"rank {rank}").write_text(str(os.getpid()))
        callback = CompressionCallback(InCalibrationOfAll(folder=str(tmp_path)))
        quiet(tmp_path, callback, strategy="ddp", devices=2, max_epochs=1).fit(Regression(), Sums())

    for end in run_two_ranks(work, tmp_path, 20):
        assert end.splitlines()[-1].endswith("SIGTERMException: 143")
    assert not (tmp_path / "compressed").exists()
