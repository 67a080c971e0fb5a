"""What lightning_compress.json may hold: the key at fault is named."""

import copy
import json

import pytest

from lightning_compress.export.own_file import read_own

TENSOR = {"dtype": "float32", "shape": [2, 1], "values": [0.5, 1]}
RIGHT = {
    "format_version": 1,
    "dense": {"a.b": {"scheme": {"targets": ["Linear"]}, "scale": TENSOR, "zero_point": None}},
    "names": {"a.b": "c"},
    "dtype": "bfloat16",
    "online": {"a.b": [{"side": "input", "signs": [1, -1]}]},
    "structure": [{"shapes": {"a.weight": [2, 3]}, "attributes": {"a": {"n": 2}}, "config": {}}],
}


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_what_is_right_comes_back(tmp_path):
    assert read_own(write(tmp_path / "own.json", RIGHT)) == RIGHT
    assert read_own(tmp_path / "absent.json") == {"format_version": 1, "dense": {}, "names": {}}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format_version"], "1", "format_version: Input should be a valid integer"),
        (["dense"], [], "dense: Input should be a valid dictionary"),
        (["dense", "a.b", "scale"], None, "dense.a.b.scale: Input should be a valid dictionary"),
        (["dense", "a.b", "scale", "dtype"], "nn", "dense.a.b.scale.dtype: Input should be 'float64'"),
        (["dense", "a.b", "scale", "shape"], [10**12, 1], r"scale: Value error, shape \[1000000000000, 1\] needs"),
        (["dense", "a.b", "scale", "shape"], [-2, -1], "scale.shape.0: Input should be greater than or equal to 0"),
        (["dense", "a.b", "scale", "values"], ["x", 1], "dense.a.b.scale.values.0"),
        (["names"], {"a": 3}, "names.a: Input should be a valid string"),
        (["dtype"], "int8", "dtype: Input should be 'float64', 'float32', 'float16' or 'bfloat16'"),
        (["online", "a.b", 0, "side"], "left", "online.a.b.0.side: Input should be 'input' or 'output'"),
        (["online", "a.b", 0, "signs"], [2], "online.a.b.0.signs.0: Input should be -1 or 1"),
        (["structure", 0, "shapes"], 3, "structure.0.shapes: Input should be a valid dictionary"),
        (["structure", 0, "attributes"], {"a": {"forward": "x"}}, "structure.0.attributes.a.forward"),
        (["more"], 1, "more: Extra inputs are not permitted"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, path, value, message):
    content = copy.deepcopy(RIGHT)
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=rf"own.json is not a file that save wrote: .*{message}"):
        read_own(write(tmp_path / "own.json", content))


@pytest.mark.parametrize("key", ["format_version", "dense", "names"])
def test_a_key_that_is_missing_is_named(tmp_path, key):
    with pytest.raises(
        ValueError, match=f"own.json is not a file that save wrote: {key}: Field required; copy the folder"
    ):
        read_own(write(tmp_path / "own.json", {k: v for k, v in RIGHT.items() if k != key}))
