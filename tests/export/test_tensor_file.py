"""A safetensors file through plain reads: the bits that safetensors wrote, and errors for damaged files."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from lightning_compress.export import tensor_file
from lightning_compress.export.tensor_file import DTYPES, Pages, TensorFile


def write_raw(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for name, dtype in DTYPES.items():
        data = torch.randint(0, 2 if name == "BOOL" else 256, (6 * dtype.itemsize,), dtype=torch.uint8, generator=g)
        tensors[name] = data.view(dtype).reshape(2, 3)
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "a.safetensors")
    assert set(file.names) == set(tensors)
    for name, tensor in tensors.items():
        again = file.read(name)
        assert (again.dtype, again.shape, file.shape(name)) == (tensor.dtype, tensor.shape, tuple(tensor.shape))
        assert file.nbytes(name) == tensor.nbytes
        flat = (again.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
        assert torch.equal(*flat)


def test_the_result_is_not_a_map_of_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(4)}, path)
    tensor = TensorFile(path).read("a")
    save_file({"a": torch.zeros(4)}, path)
    assert_close(tensor, torch.ones(4))


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "length", "told"),
    [
        ({"a": ENTRY}, 2**40, "a header of 1099511627776 bytes in a file of"),
        (b"[]", None, "its header is a list, expected an object"),
        (b"{", None, "a.safetensors"),
        ({"a": ENTRY | {"dtype": "F4"}}, None, "'a' has dtype 'F4', expected one of BOOL"),
        ({"a": ENTRY | {"shape": [2**40]}}, None, "has bytes 0 to 8 of 8"),
        ({"a": ENTRY | {"shape": [-2, -1]}}, None, "shape and offsets must be whole numbers"),
        ({"a": ENTRY | {"data_offsets": [8, 16]}}, None, "has bytes 8 to 16 of 8"),
        ({"a": ENTRY | {"data_offsets": [0]}}, None, "a.safetensors"),
        ({"a": 3}, None, "a.safetensors"),
    ],
    ids=str,
)
def test_a_damaged_header_is_refused_before_memory_is_taken(tmp_path, header, length, told):
    path = write_raw(tmp_path / "a.safetensors", header, b"\0" * 8, length)
    with pytest.raises(ValueError, match=r"a\.safetensors") as error:
        TensorFile(path)
    assert told in str(error.value)


def test_a_file_that_shrank_since_is_an_error(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(40)}, path)
    file = TensorFile(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="the file ends 5 bytes early"):
        file.read("a")


def test_the_memory_of_a_tensor_is_given_on_when_the_tensor_is_gone(monkeypatch):
    monkeypatch.setattr(tensor_file, "PAGES", 4096)
    pages = Pages()
    first, second = pages.take(8192), pages.take(8192)
    place, view = first.data_ptr(), first[10:20].view(torch.uint8)
    assert second.data_ptr() != place
    del first
    third = pages.take(8192).fill_(3)  # the view still needs the memory of the first
    assert third.data_ptr() != place
    del view
    fourth = pages.take(8192)
    assert fourth.data_ptr() == place
    del third
    pages.take(4096)
    assert list(pages._free) == [4096]  # another size: what is free is not kept for long
