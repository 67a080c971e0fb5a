"""One run, one folder: who holds it, who may take it over; and what is refused before training."""

import json
import os

import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_compress import CompressionCallback
from lightning_compress.files.leftovers import host_name
from lightning_compress.training import outputs
from lightning_compress.training.outputs import FolderLock
from tests.files.test_leftovers import dead as dead
from tests.support.training_runs import RecordingModifier, Regression, RoundingModifier, Sums, quiet


def holder(**changes):
    own = {"host": host_name(), "process": 1, "started": outputs._started(1), "run": "theirs", "job": None}
    return own | changes


def test_a_lock_names_its_holder_and_goes_with_it(tmp_path):
    lock, path = FolderLock(), tmp_path / "a" / ".lock"
    lock.acquire(path, "mine")
    assert json.loads(path.read_text())["run"] == "mine"
    assert json.loads(path.read_text())["process"] == os.getpid()
    FolderLock().release()
    assert path.exists()
    lock.release()
    assert not path.exists()


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, False),                                            # process 1 lives
        ({"run": "mine"}, False),                               # this run is resumed while it runs
        ({"started": "before the last boot"}, True),            # another process of that number
        ({"process": "dead"}, True),
        ({"process": "own"}, True),
        ({"host": "elsewhere"}, False),
        ({"host": "elsewhere", "run": "mine"}, True),           # requeued to another machine
        ({"host": "elsewhere", "job": "7"}, True),              # the same, before its first checkpoint
        ({"host": "elsewhere", "job": "8"}, False),
    ],
    ids=str,
)  # fmt: skip
def test_who_may_take_a_lock_over(tmp_path, monkeypatch, dead, changes, taken):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    number = {"dead": dead, "own": os.getpid()}.get(changes.get("process"), 1)
    path, content = tmp_path / ".lock", holder(**changes) | {"process": number}
    path.write_text(json.dumps(content))
    lock = FolderLock()
    if taken:
        lock.acquire(path, "mine")
        assert json.loads(path.read_text())["process"] == os.getpid()
        return
    with pytest.raises(ValueError, match=f"is in use by process 1 on {content['host']}, run {content['run']}"):
        lock.acquire(path, "mine")
    lock.release()
    assert json.loads(path.read_text()) == content


def test_a_lock_that_was_half_written_goes_after_a_minute(tmp_path):
    path = tmp_path / ".lock"
    path.write_text("")
    with pytest.raises(ValueError, match="is in use by"):
        FolderLock().acquire(path, "mine")
    os.utime(path, (0, path.stat().st_mtime - 61))
    FolderLock().acquire(path, "mine")
    assert json.loads(path.read_text())["run"] == "mine"


def fit(folder, *callbacks, export_dir=None, module=None, **options):
    callback = CompressionCallback(RoundingModifier(), export_dir=export_dir)
    module = module or Regression()
    quiet(folder, callback, *callbacks).fit(module, Sums(), **options)
    return module


class Fails(Regression):
    def training_step(self, batch, batch_idx):
        raise RuntimeError("in training")


@pytest.mark.parametrize("export_dir", [None, "elsewhere/out"])
def test_a_second_run_is_refused_before_training_and_locks_end_with_the_fit(tmp_path, export_dir):
    class Second(Callback):
        def on_train_start(self, trainer, module):
            seen.append(sorted(p.name for p in tmp_path.rglob(".*")))
            for path in trainer.callbacks[0].run.outputs.locks:
                content = json.loads(path.read_text())
                path.write_text(json.dumps(holder()))  # as if process 1 had come first
                with pytest.raises(ValueError, match="is in use by process 1"):
                    fit(tmp_path, export_dir=place, module=Fails())
                path.write_text(json.dumps(content))

    seen = []
    place = export_dir and str(tmp_path / export_dir)
    with pytest.raises(RuntimeError, match="in training"):
        fit(tmp_path, export_dir=place, module=Fails())
    fit(tmp_path, Second(), export_dir=place)
    assert seen == [[*([".lightning_compress.lock"]), *([".out.lock"] if export_dir else [])]]
    assert list(tmp_path.rglob(".*")) == []


def test_the_best_checkpoint_of_another_run_is_not_exported(tmp_path):
    class Intrudes(ModelCheckpoint):
        """Another run writes its best weights under the same name."""

        def on_train_end(self, trainer, module):
            super().on_train_end(trainer, module)
            if trainer.default_root_dir == str(tmp_path / "one") and not (tmp_path / "two").exists():
                fit(tmp_path / "two", best())

    def best():
        return Intrudes(tmp_path / "shared", "best", monitor="val/mse", enable_version_counter=False)

    with pytest.warns(UserWarning, match=r"shared/best.ckpt, was overwritten by another run, so that the last weights"):
        fit(tmp_path / "one", best())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: (root / "report").touch(), r"report is a file, and the report goes into a folder of that name"),
        (lambda root: (root / "compressed.ckpt").mkdir(), r"compressed.ckpt is a folder, and a checkpoint"),
    ],
)
def test_what_lies_in_the_way_is_told_before_training(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, module=Fails())


@pytest.mark.parametrize("argument", ["default_root_dir", "export_dir"])
def test_folders_of_other_machines_are_refused(tmp_path, argument):
    options = {"folder" if argument == "default_root_dir" else argument: "memory://bucket/x"}
    with pytest.raises(ValueError, match=rf"{argument}='memory://bucket/x' is not a folder of this machine"):
        fit(**{"folder": tmp_path, **options}, module=Fails())


def test_a_relative_folder_is_that_of_the_start(tmp_path, monkeypatch):
    class Moves(Regression):
        def on_train_start(self):
            os.chdir(tmp_path / "b")

    for name in "ab":
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "a")
    fit("run", module=Moves())
    assert {"compressed", "compressed.ckpt", "report"} <= {path.name for path in (tmp_path / "a" / "run").iterdir()}
    assert not list(tmp_path.glob("b/run/compressed*"))


def test_an_export_folder_that_exists_is_an_error_before_training(tmp_path):
    (tmp_path / "compressed").mkdir()
    (tmp_path / "compressed" / "mine.txt").touch()
    modifier = RecordingModifier()
    with pytest.raises(ValueError, match="exists and is not empty"):
        quiet(tmp_path, CompressionCallback(modifier)).fit(Regression(), Sums())
    assert modifier._events == []
