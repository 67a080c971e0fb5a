"""A folder appears whole or not at all."""

import ctypes
import itertools
import json
import os
import shutil
import stat

import pytest

from lightning_compress.files import atomic_folder as atomic
from lightning_compress.files.atomic_folder import MANIFEST, check_target, origin_of, whole_folder


def write_export(folder, text="old", **options):
    with whole_folder(folder, **options) as partial:
        (partial / "config.json").write_text(text)
        (partial / "model.safetensors").write_text(text)


def contents(folder):
    return {p.name: p.read_text() for p in folder.iterdir() if p.name != MANIFEST}


def test_it_appears_at_the_end_with_missing_parents_made(tmp_path):
    target = tmp_path / "a" / "b" / "out"
    with whole_folder(target) as partial:
        (partial / "file").write_text("x")
        assert not target.exists()
        assert partial.parent == target.parent
        assert partial.name.startswith(".out.partial-")
    assert contents(target) == {"file": "x"}
    assert os.listdir(target.parent) == ["out"]


def test_an_empty_folder_of_that_name_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with whole_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("x")
    assert contents(tmp_path / "out") == {"file": "x"}


def test_others_may_read_it_as_they_may_read_any_folder(tmp_path):
    (tmp_path / "usual").mkdir()
    with whole_folder(tmp_path / "out"):
        pass
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("usual", "out")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_error_leaves_nothing(tmp_path, error):
    def write():
        with whole_folder(tmp_path / "a" / "b" / "out") as partial:
            (partial / "file").write_text("x")
            raise error

    with pytest.raises(type(error)):
        write()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_error_while_overwriting_keeps_the_old(tmp_path, error):
    def write():
        with whole_folder(tmp_path / "out", overwrite=True) as partial:
            (partial / "config.json").write_text("new")
            raise error

    write_export(tmp_path / "out")
    with pytest.raises(type(error)):
        write()
    assert contents(tmp_path / "out") == {"config.json": "old", "model.safetensors": "old"}
    assert os.listdir(tmp_path) == ["out"]


def test_an_error_in_the_last_step_brings_the_old_back(tmp_path, monkeypatch):
    write_export(tmp_path / "out")
    monkeypatch.setattr(atomic, "_exchange", lambda one, two: False)
    rename = os.rename

    def fail_at_the_new_one(source, destination):
        if ".partial-" in str(source):
            raise OSError("interrupted")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fail_at_the_new_one)
    with pytest.raises(OSError, match="interrupted"), whole_folder(tmp_path / "out", overwrite=True):
        pass
    assert contents(tmp_path / "out") == {"config.json": "old", "model.safetensors": "old"}
    assert os.listdir(tmp_path) == ["out"]


def test_overwrite_replaces_all_of_it(tmp_path):
    write_export(tmp_path / "out")
    with whole_folder(tmp_path / "out", overwrite=True) as partial:
        (partial / "file").write_text("x")
    assert contents(tmp_path / "out") == {"file": "x"}
    assert os.listdir(tmp_path) == ["out"]


def test_what_is_there_is_not_replaced_unasked(tmp_path):
    write_export(tmp_path / "out")
    with pytest.raises(ValueError, match=r"out exists and is not empty; .*overwrite=True"):
        check_target(tmp_path / "out")


@pytest.mark.parametrize(
    ("foreign", "message"),
    [
        ({"chapter1.tex": "x"}, f"has no {MANIFEST}, so that this package did not write it"),
        ({"config.json": "{}", "model.safetensors": ""}, f"has no {MANIFEST}"),
        ({MANIFEST: "half of"}, f"has no {MANIFEST}"),
        ({MANIFEST: '{"files": 3, "origin": null}'}, f"has no {MANIFEST}"),
        ({MANIFEST: '{"files": ["config.json"], "origin": null}', "config.json": "", "thesis.tex": "", "a/b.txt": ""},
         "holds a/b.txt, thesis.tex, which this package did not write"),
        ({MANIFEST: '{"files": [], "origin": {"run": "b"}}'}, "was not written by this run"),
        ({MANIFEST: '{"files": [], "origin": null}'}, "was not written by this run"),
    ],
)  # fmt: skip
def test_overwrite_deletes_nothing_that_this_run_did_not_write(tmp_path, foreign, message):
    folder = tmp_path / "out"
    for name, text in foreign.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        check_target(folder, overwrite=True, run="a")
    with pytest.raises(ValueError, match=message), whole_folder(folder, overwrite=True, origin={"run": "a"}):
        pass
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == foreign.keys()


def test_what_comes_in_while_the_new_one_is_written_is_kept(tmp_path):
    def write():
        with whole_folder(tmp_path / "out", overwrite=True):
            (tmp_path / "out" / "notes.txt").write_text("mine")

    write_export(tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds notes.txt, which this package did not write"):
        write()
    assert contents(tmp_path / "out") == {"config.json": "old", "model.safetensors": "old", "notes.txt": "mine"}


def test_the_manifest_names_files_and_origin(tmp_path):
    write_export(tmp_path / "out", origin={"run": "a", "clock": {"steps": [4]}})
    assert origin_of(tmp_path / "out") == {"run": "a", "clock": {"steps": [4]}}
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["files"] == ["config.json", "model.safetensors"]
    write_export(tmp_path / "out", "new", overwrite=True, origin={"run": "a"})
    assert contents(tmp_path / "out") == {"config.json": "new", "model.safetensors": "new"}
    assert origin_of(tmp_path) == {}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("exchange", [True, False], ids=["exchanged", "two renames"])
@pytest.mark.parametrize("killed_at", range(4))
def test_a_kill_at_any_rename_leaves_an_export_of_that_name(tmp_path, monkeypatch, exchange, killed_at):
    """The process ends before the n-th call that moves or removes a folder; the next start finds the old or the new."""
    write_export(tmp_path / "out")
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, two: False)
    child = os.fork()
    if child == 0:
        calls = itertools.count()

        def dying(original):
            def call(*arguments, **options):
                if next(calls) == killed_at:
                    os._exit(0)
                return original(*arguments, **options)

            return call

        for owner, name in ((os, "rename"), (shutil, "rmtree"), (atomic, "_exchange")):
            setattr(owner, name, dying(getattr(owner, name)))
        write_export(tmp_path / "out", "new", overwrite=True)
        os._exit(0)
    os.waitpid(child, 0)
    if exchange and hasattr(ctypes.CDLL(None), "renameat2"):
        assert (tmp_path / "out").exists()  # at every moment
    check_target(tmp_path / "out", overwrite=True)  # the next start
    assert contents(tmp_path / "out") in [{"config.json": t, "model.safetensors": t} for t in ("old", "new")]
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(ValueError, match="is a file, expected the name of a folder"):
        check_target(tmp_path / "out")
    with pytest.raises(ValueError, match=r"cannot make .*choose another"):
        check_target(tmp_path / "out" / "below" / "it")


def test_a_place_that_cannot_be_written_is_named_early(tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(ValueError, match=r"cannot write into .*Permission denied.*; choose another folder"):
        check_target(tmp_path / "out")


def test_checking_leaves_nothing(tmp_path):
    assert check_target(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert os.listdir(tmp_path) == []


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    write_export(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    with whole_folder(tmp_path / "link", overwrite=True) as partial:
        (partial / "file").write_text("x")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real") == {"file": "x"}


def test_two_at_once_do_not_mix(tmp_path):
    def write():
        with whole_folder(tmp_path / "out") as slow, whole_folder(tmp_path / "out") as quick:
            (slow / "slow").write_text("x")
            (quick / "quick").write_text("x")

    with pytest.raises(ValueError, match="exists and is not empty"):
        write()
    assert contents(tmp_path / "out") == {"quick": "x"}
