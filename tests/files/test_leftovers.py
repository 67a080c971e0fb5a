"""What killed processes left is removed, and what anyone still writes is not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_compress.files.leftovers import host_name, partial_path, remove_leftovers


@pytest.fixture(scope="module")
def dead():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(60)
    return process.pid


def make(folder, name, days=0.0):
    path = folder / name
    path.mkdir()
    (path / "weights").write_text("x")
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - days * 86400))
    return name


def test_who_made_it_and_when_decides(tmp_path, dead):
    here, living = host_name(), os.getpid()
    gone = [
        make(tmp_path, f".out.partial-{here}-{dead}-0a"),
        make(tmp_path, f".out.probe-{here}-{dead}-0a"),
        make(tmp_path, ".out.partial-elsewhere-1-0a", days=2),
        make(tmp_path, ".out.partial-0a1b2c3d", days=2),  # of an earlier version: no name in it
        make(tmp_path, f".other.partial-{here}-{dead}-0a"),
    ]
    kept = [
        make(tmp_path, f".out.partial-{here}-{living}-0a", days=2),
        make(tmp_path, ".out.partial-elsewhere-1-0b"),
        make(tmp_path, ".out.partial-0a1b2c3e"),
        make(tmp_path, f"out.partial-{here}-{dead}-0a"),
        make(tmp_path, ".out.partial-mine", days=2),
    ]
    remove_leftovers(tmp_path, tmp_path / "out")
    assert set(os.listdir(tmp_path)) == {*kept, gone[-1]}
    remove_leftovers(tmp_path)
    assert set(os.listdir(tmp_path)) == set(kept)
    remove_leftovers(tmp_path / "missing")


def test_a_folder_gets_its_name_back_only_where_it_is_free(tmp_path, dead):
    make(tmp_path, f".out.replaced-{host_name()}-{dead}-0a")
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["out"]
    make(tmp_path, f".out.replaced-{host_name()}-{dead}-0b")
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["out"]


def test_files_keep_their_suffix(tmp_path, dead):
    path = partial_path(tmp_path / "a.b.json", suffix=".json")
    assert path.name.startswith(f".a.b.partial-{host_name()}-{os.getpid()}-")
    assert path.suffix == ".json"
    left = Path(str(path).replace(f"-{os.getpid()}-", f"-{dead}-"))
    for file in (path, left):
        file.touch()
    remove_leftovers(tmp_path, tmp_path / "a.b.json")
    assert list(tmp_path.iterdir()) == [path]
