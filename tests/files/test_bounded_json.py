"""JSON files that are not trusted."""

import pytest

from lightning_compress.files.bounded_json import read_bounded_json


def test_a_small_file_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"x": [1, "é"]}', encoding="utf-8")
    assert read_bounded_json(tmp_path / "a.json", 20) == {"x": [1, "é"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" " * 100_001, "has 100001 bytes, expected at most 100000"),
        ("[" * 100_000, "is nested too deeply"),
        ("{", "Expecting property name"),
    ],
)
def test_others_are_refused(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_bounded_json(tmp_path / "a.json", 100_000)
