"""A folder appears whole or not at all."""

import os
import stat

import pytest

from lightning_compress.export.atomic import check_target, whole_folder


def write_export(folder, text="old"):
    folder.mkdir()
    (folder / "config.json").write_text(text)
    (folder / "model.safetensors").write_text(text)


def contents(folder):
    return {p.name: p.read_text() for p in folder.iterdir()}


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


def test_overwrite_deletes_no_folder_that_is_no_export(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("x")
    with pytest.raises(ValueError, match="does not look like an earlier export"):
        check_target(tmp_path / "thesis", overwrite=True)


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

    with pytest.raises(OSError, match="not empty"):
        write()
    assert contents(tmp_path / "out") == {"quick": "x"}
