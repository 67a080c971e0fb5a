"""Objects are read only from checkpoints that this process saved, whatever a file's date says."""

import os
import shutil

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_compress import CompressionCallback
from lightning_compress.training.saved_files import SavedFiles
from tests.support.training_runs import Regression, RoundingModifier, Sums, quiet


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


class WithObjects(Regression):
    def __init__(self, net=None):
        super().__init__()
        self.save_hyperparameters({"net": nn.Linear(1, 1)}, logger=False)


def fit(folder, module, **options):
    keeping = ModelCheckpoint(folder / "kept", "b", "val/mse", save_last=True)
    trainer = quiet(folder, CompressionCallback(RoundingModifier()), keeping)
    trainer.fit(module, Sums(), **options)


def test_a_sent_checkpoint_runs_no_code_whatever_its_date(tmp_path):
    """last.ckpt holds tensors only, and names another file as the best so far."""
    fit(tmp_path / "first", Regression())
    sent, mark = tmp_path / "sent", tmp_path / "code ran"
    sent.mkdir()
    torch.save({"state_dict": Payload(mark)}, sent / "payload.bin")
    os.utime(sent / "payload.bin", (2**31 - 10, 2**31 - 10))
    content = torch.load(tmp_path / "first" / "kept" / "last.ckpt", weights_only=True)
    for state in content["callbacks"].values():
        if "best_model_path" in state:
            state |= {"best_model_path": str(sent / "payload.bin"), "dirpath": str(sent / "kept")}
    torch.save(content, sent / "last.ckpt")
    with (
        pytest.warns(UserWarning, match=r"payload.bin, was saved by another process .* set load_best=False"),
        pytest.raises(ValueError, match="was not saved by this process and holds more than tensors") as caught,
    ):
        fit(sent, Regression(), ckpt_path=sent / "last.ckpt")
    assert not mark.exists()
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("change", ["copied over", "appended to", "touched", "moved here"])
def test_a_file_that_was_changed_since_is_not_ours(tmp_path, change):
    path, other = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    for file in (path, other):
        torch.save({"net": nn.Linear(1, 1)}, file)
    files = SavedFiles()
    files.note(path)
    assert path in files
    assert str(path) in files
    assert other not in files
    before = path.stat()
    if change == "copied over":
        shutil.copy2(other, tmp_path / "c.ckpt")
        os.utime(tmp_path / "c.ckpt", ns=(before.st_atime_ns, before.st_mtime_ns))
        os.replace(tmp_path / "c.ckpt", path)
    elif change == "appended to":
        with path.open("ab") as file:
            file.write(b"x")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "touched":
        os.utime(path, (2**31 - 10, 2**31 - 10))
    else:
        os.rename(path, tmp_path / "elsewhere.ckpt")
        os.rename(other, path)
    assert path not in files


def test_what_is_noted_is_what_the_trainer_saved(tmp_path):
    files, trainer = SavedFiles(), quiet(tmp_path)
    undo = files.watch(trainer)
    trainer.fit(Regression(), Sums())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    (tmp_path / "link.ckpt").symlink_to(tmp_path / "one.ckpt")
    undo()
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    assert tmp_path / "link.ckpt" in files
    assert tmp_path / "two.ckpt" not in files
