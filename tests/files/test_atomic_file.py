"""A file is there whole or not at all."""

import pytest

from lightning_compress.files.atomic_file import whole_file


def test_folders_are_made_and_nothing_else_stays(tmp_path):
    with whole_file(tmp_path / "a" / "b" / "x.json") as path:
        path.write_text("new")
        assert path.suffix == ".json"
        assert not (tmp_path / "a" / "b" / "x.json").exists()
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["x.json"]
    assert (tmp_path / "a" / "b" / "x.json").read_text() == "new"


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_error_leaves_the_older_file(tmp_path, error):
    target = tmp_path / "x.csv"
    target.write_text("old")

    def write() -> None:
        with whole_file(target) as path:
            path.write_text("half of the n")
            raise error

    with pytest.raises(type(error)):
        write()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
