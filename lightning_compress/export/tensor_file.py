"""safetensors files, read with plain reads instead of memory maps.

A private map counts against RLIMIT_DATA as a whole, and keeps the file open. Files are not trusted: each length is
compared with the file's size before memory is allocated.

    8 bytes, little endian: length of the header | header, JSON: {name: {"dtype", "shape", "data_offsets"}} | data
"""

import json
import math
import mmap
import os
import weakref
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lightning_compress.export.tensors import DTYPES, INDEX, naming, weight_map

__all__ = ["Pages", "TensorFile", "TensorFolder"]

HEADER_BYTES = 10**8  # as safetensors
PAGES = 2**20  # bytes


class TensorFile:
    """The tensors of one file; each is read when it is needed, and the file is open only meanwhile.

    Args:
        path: A safetensors file.

    Raises:
        ValueError: It is damaged; the message names the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._places: dict[str, tuple[torch.dtype, list[int], int]] = {}  # dtype, shape, position in the file
        with naming(path), path.open("rb") as file:
            header, start = _header(file)
            for name, entry in header.items():
                if name != "__metadata__":
                    self._places[name] = _place(name, entry, start, os.fstat(file.fileno()).st_size)

    @property
    def names(self) -> list[str]:
        """Names of the tensors, in the order of the header."""
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self._places[name][1])

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        return self._places[name][0]

    def nbytes(self, name: str) -> int:
        """The bytes of a tensor."""
        dtype, shape, _ = self._places[name]
        return math.prod(shape) * dtype.itemsize

    def read(self, name: str, pages: "Pages | None" = None) -> Tensor:
        """One tensor, in memory of its own; ``pages`` gives memory of tensors that are gone."""
        dtype, shape, position = self._places[name]
        data = (pages or Pages()).take(self.nbytes(name))
        with naming(self.path, repr(name)), self.path.open("rb", buffering=0) as file:
            file.seek(position)
            view, count = memoryview(data.numpy()), 0  # type: ignore[arg-type]
            while count < len(view):  # a read is limited to 2 GiB
                if not (step := file.readinto(view[count:])):
                    raise ValueError(f"the file ends {len(view) - count} bytes early; copy it again")
                count += step
        return data.view(dtype).reshape(shape)


class TensorFolder:
    """The tensors of a model's folder: of model.safetensors, or of the files that its index names.

    Args:
        folder: The folder.

    Raises:
        ValueError: A file is missing or damaged, or a tensor is in two files.
    """

    def __init__(self, folder: Path):
        index = folder / INDEX
        names = sorted(set(weight_map(index).values())) if index.exists() else ["model.safetensors"]
        self.files: dict[str, TensorFile] = {}  # by tensor
        for name in names:
            if not (folder / name).is_file():
                raise ValueError(f"{folder} has no {name}; expected the safetensors files of a model")
            file = TensorFile(folder / name)
            if twice := self.files.keys() & file.names:
                raise ValueError(f"{min(twice)!r} is in {folder / name} and in {self.files[min(twice)].path.name}")
            self.files |= dict.fromkeys(file.names, file)
        self._pages = Pages()

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        return self.files[name].read(name, self._pages)

    def nbytes(self, name: str) -> int:
        """The bytes of a tensor."""
        return self.files[name].nbytes(name)


class Pages:
    """Memory for large tensors, in pages of their own; small ones come from the heap.

    Weights from the heap would lie between the temporaries of a block, and keep their memory after they are freed: at
    49 MiB a block the peak was 40 MB higher. The pages of a tensor that is gone are given to the next one of its size:
    faults of fresh pages took a tenth of the CPU time of RTN. At the first tensor of another size all that are free go
    back to the system.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[mmap.mmap]] = {}

    def take(self, size: int) -> Tensor:
        """Bytes, with any values."""
        if size < PAGES or not hasattr(mmap, "MAP_PRIVATE"):
            return torch.empty(size, dtype=torch.uint8, device="cpu")
        if free := self._free.get(size):
            pages = free.pop()
        else:
            self._free.clear()
            pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        array = torch.frombuffer(pages, dtype=torch.uint8).numpy()
        weakref.finalize(array, self._put, pages).atexit = False  # the tensor holds the array
        return torch.from_numpy(array)

    def _put(self, pages: mmap.mmap) -> None:
        self._free.setdefault(len(pages), []).append(pages)


def _header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The header, and the position of the data."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(HEADER_BYTES, size - 8):
        raise ValueError(f"a header of {length} bytes in a file of {size}; copy it again")
    header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError(f"its header is a {type(header).__name__}, expected an object; copy it again")
    return header, 8 + length


def _place(name: str, entry: Any, start: int, size: int) -> tuple[torch.dtype, list[int], int]:
    """Dtype, shape and position of a tensor."""
    dtype, shape, (begin, end) = DTYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
    if dtype is None:
        raise ValueError(f"{name!r:.200} has dtype {entry['dtype']!r:.40}, expected one of {', '.join(DTYPES)}")
    if not all(type(n) is int and n >= 0 for n in [*shape, begin, end]):
        raise ValueError(f"{name!r:.200}: shape and offsets must be whole numbers from 0 up; copy the file again")
    if start + end > size or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{name!r:.200} with shape {shape!r:.80} has bytes {begin} to {end} of {size - start}; copy the file again"
        )
    return dtype, shape, start + begin
