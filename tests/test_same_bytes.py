"""What scripts/same_bytes.py says of two sides, and that its cases name recipes and modifiers of the package."""

import importlib
import json
import struct
import sys
from pathlib import Path

import pytest

import lightning_compress

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

same_bytes = importlib.import_module("same_bytes")
cases = importlib.import_module("same_bytes_cases")


def safetensors(**tensors: bytes) -> bytes:
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, content in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(content)], "data_offsets": [offset, offset + len(content)]}
        offset += len(content)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(tensors.values())


def test_the_tensor_that_differs_is_named_and_no_other(tmp_path):
    described = []
    for last in (b"22", b"23"):
        path = tmp_path / "model.safetensors"
        path.write_bytes(safetensors(a=b"1", b=last))
        described.append({path.name: cases.described(path)})
    assert same_bytes.differences(described[0], described[0]) == []
    first, where = same_bytes.differences(*described)
    assert first == "model.safetensors: 1 tensors, lines or fields differ"
    assert where.startswith("    b:\n      - U8 [2] ")


def test_a_file_of_one_side_and_a_change_that_has_no_part_are_differences():
    assert same_bytes.differences({"a": {"": "1"}}, {"b": {"": "1"}}) == ["a: only before", "b: only after"]
    assert same_bytes.differences({"a": {"": "1", "line 1": "x"}}, {"a": {"": "2", "line 1": "x"}}) == ["a differs"]


def test_a_case_that_fails_on_both_sides_is_not_the_same(monkeypatch, capsys):
    failed = {"rtn_w4/llama": {"error": {"": "ValueError: gone"}}}
    monkeypatch.setattr(same_bytes, "results_of_commit", lambda base, chosen: failed)
    monkeypatch.setattr(same_bytes, "run_side", lambda root, chosen: failed)
    assert same_bytes.compare("main", list(failed)) == 1
    assert "cannot be made on either side: ValueError: gone" in capsys.readouterr().out


@pytest.mark.parametrize("case", [*cases.COMPRESSED, *cases.TRAINED])
def test_a_case_names_what_the_package_has(case):
    recipe, models, _ = {**cases.COMPRESSED, **cases.TRAINED}[case]
    assert set(models) <= cases.MODELS.keys()
    if isinstance(recipe, str):
        assert (ROOT / "conf" / "compress" / f"{recipe}.yaml").exists()
    else:
        assert all(name in lightning_compress.__all__ for name, _ in recipe)
