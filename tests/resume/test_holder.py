"""One process at a time has a folder; a kill gives it back."""

import json
import os
import signal
from contextlib import suppress

import pytest

from lightning_compress.files.leftovers import host_name
from lightning_compress.resume.holder import Holder


@pytest.fixture
def in_child():
    """``in_child(work)`` forks; ``work`` gets a function that writes to the pipe: (process, pipe)."""
    processes = []

    def fork(work):
        read, write = os.pipe()
        if (process := os.fork()) == 0:
            try:
                work(lambda text: os.write(write, text.encode()))
                signal.pause()
            finally:
                os._exit(0)
        os.close(write)
        processes.append(process)
        return process, read

    yield fork
    for process in processes:
        with suppress(ChildProcessError, ProcessLookupError):
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


def test_the_holder_is_named_and_a_kill_gives_the_folder_back(tmp_path, monkeypatch, in_child):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    folder = tmp_path / "new" / "log"

    def hold(say):
        holders.append(Holder(folder))
        say("held")

    holders = []
    process, pipe = in_child(hold)
    assert os.read(pipe, 100) == b"held"
    who = f"process {process} on {host_name()}, job 77, since 2"
    with pytest.raises(ValueError, match=f"{folder} is in use by {who}.*: wait for it, or give another log"):
        Holder(folder)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    holder = Holder(folder)
    assert json.loads((folder / "holder.json").read_text())["process"] == os.getpid()
    holder.release()


def test_a_forked_child_does_not_hold_the_folder(tmp_path, in_child):
    """A loader's worker that outlives a killed run for a moment must not keep the next one out."""
    holder = Holder(tmp_path)
    _, pipe = in_child(lambda say: say("child"))
    assert os.read(pipe, 100) == b"child"
    holder.release()

    def take(say):
        Holder(tmp_path)
        say("taken")

    _, pipe = in_child(take)
    assert os.read(pipe, 100) == b"taken"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write into .*/file/log: .*; choose another folder for the log"):
        Holder(tmp_path / "file" / "log")


def test_a_holder_file_without_a_name_is_another_process(tmp_path, in_child):
    def hold(say):
        holders.append(Holder(tmp_path))
        say("held")

    holders = []
    _, pipe = in_child(hold)
    assert os.read(pipe, 100) == b"held"
    (tmp_path / "holder.json").write_text("{")
    with pytest.raises(ValueError, match="is in use by another process: wait for it"):
        Holder(tmp_path)
