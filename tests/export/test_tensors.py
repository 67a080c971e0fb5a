"""Files of tensors that are damaged, or name others: one error, with the file and the key."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lightning_compress.export.tensors import TensorFiles, naming, read_json, write_tensors

TENSORS = {"a.weight": torch.ones(4), "b.weight": torch.zeros(4)}


@pytest.fixture
def folder(tmp_path):
    write_tensors(TENSORS, tmp_path, 16)
    return tmp_path


def change_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_folder_of_several_files_comes_back(folder):
    files = TensorFiles(folder)
    assert files.path_of("b.weight") == folder / "model-00002-of-00002.safetensors"
    assert all(torch.equal(value[...], TENSORS[name]) for name, value in files.rest().items())


@pytest.mark.parametrize("file", ["../x.safetensors", "/x.safetensors", "link/x.safetensors", "x.bin", "..", 3, None])
def test_an_index_names_files_beside_it_only(folder, file):
    """Also through a link to a folder elsewhere; the file is there each time."""
    (folder / "below").mkdir()
    outside = folder / "x.safetensors"
    save_file({"a.weight": torch.ones(4)}, outside)
    (folder / "below" / "link").symlink_to(folder)
    change_index(folder / "below", {"a.weight": str(outside) if str(file).startswith("/") else file})
    with pytest.raises(ValueError, match=r"index.json: weight_map gives .* for 'a.weight', expected the name of a"):
        TensorFiles(folder / "below")


@pytest.mark.parametrize("weight_map", [None, [], {}, 3, "x"])
def test_an_index_without_names(folder, weight_map):
    change_index(folder, weight_map)
    with pytest.raises(ValueError, match=r"index.json: weight_map must be an object of file names by tensor, got"):
        TensorFiles(folder)


def test_an_index_that_does_not_fit_its_files(folder):
    first, second = sorted(path.name for path in folder.glob("*.safetensors"))
    change_index(folder, {"a.weight": first, "c.weight": second})
    with pytest.raises(ValueError, match=rf"index.json: weight_map says that 'c.weight' is in {second}, which does"):
        TensorFiles(folder)
    save_file(TENSORS, folder / second)
    change_index(folder, {"a.weight": first, "b.weight": second})
    with pytest.raises(ValueError, match=rf"'a.weight' is in .*{second} and in {first}; which one is it"):
        TensorFiles(folder)


@pytest.mark.parametrize(
    "damage",
    [lambda b: b"", lambda b: b[:20], lambda b: b[:-1], lambda b: (2**60).to_bytes(8, "little") + b[8:],
     lambda b: b.replace(b"[0,16]", b"[9,16]"), lambda b: b.replace(b"F32", b"F99")],
    ids=["empty", "half a header", "one byte less", "a header of 2^60", "offsets", "a dtype"],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, damage):
    write_tensors({"a.weight": torch.ones(4)}, tmp_path, 10**6)
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"^{path}: .*; is it a folder that save wrote, and copied completely\?"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"[]", "holds a list, expected an object"), (b"null", "holds a NoneType"), (b"3", "holds a int"), (b"", "JSON"),
     (b'{"a": ', "cannot be read as JSON in UTF-8: Expecting value"), (b"\xff\xfe{\x00}\x00", "JSON in UTF-8: 'utf-8'"),
     (b"[" * 10**5, "cannot be read as JSON in UTF-8"), (b"1" * 5000, "cannot be read as JSON in UTF-8")],
    ids=lambda value: str(value)[:12],
)  # fmt: skip
def test_json_that_is_not_an_object_is_named(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path} .*{message}"):
        read_json(path)


def test_an_error_that_names_the_folder_stays_as_it_is(tmp_path):
    with pytest.raises(ValueError, match=rf"^{tmp_path} is full$"), naming(tmp_path / "x", "key"):
        raise ValueError(f"{tmp_path} is full")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/x, key: KeyError: 'k'; is it") as raised:  # noqa: SIM117
        with naming(tmp_path / "x", "key"):
            raise KeyError("k")
    assert isinstance(raised.value.__cause__, KeyError)
