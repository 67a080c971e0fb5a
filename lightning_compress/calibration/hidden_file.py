"""Hidden states of all batches on the disk, in place of a list of tensors: ``cache_activations="disk"``.

The file has no name: the system frees it when the walk drops it, and also when the process is killed. A hidden state
that takes as many bytes as the one before it takes its place. Shapes, strides and dtypes are in memory.
"""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["HiddenFile"]


class HiddenFile:
    """A list of tensors, or None, by batch; each read gives a new tensor on the CPU.

    Args:
        folder: Folder of the file.
        hidden: The first entries.

    Raises:
        ValueError: No file can be made there.
    """

    def __init__(self, folder: Path, hidden: Iterable[Tensor | None] = ()):
        self.folder, self._end = folder, 0
        self._places: list[tuple[int, int, Tensor] | None] = []  # start, size, and a tensor on meta for its layout
        try:
            self._file: Any = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  (closed when dropped)
        except OSError as error:
            raise ValueError(
                f"cache_activations: no file can be made in {folder}: {error}; give the path of another folder"
            ) from error
        for value in hidden:
            self.append(value)

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Tensor | None]:
        return (self[batch] for batch in range(len(self)))

    def append(self, value: Tensor | None) -> None:
        """A further batch."""
        self._places.append(None)
        if value is not None:
            self[len(self) - 1] = value

    def __setitem__(self, batch: int, value: Tensor) -> None:
        value = value.detach().cpu()
        if value.untyped_storage().nbytes() != value.nbytes:  # part of a larger tensor
            value = value.clone()
        place, size = self._places[batch], value.nbytes
        start = place[0] if place is not None and place[1] == size else self._end
        data = _bytes(value)
        try:
            self._file.seek(start)
            while data:  # a write is limited to 2 GiB
                data = data[self._file.write(data) :]
        except OSError as error:
            raise OSError(
                f"writing the hidden states of batch {batch} ({size} bytes) into {self.folder} failed: {error}; is the "
                f"disk full? Give another folder (cache_activations=FOLDER), or use cache_activations='memory'"
            ) from error
        layout = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        self._places[batch], self._end = (start, size, layout), max(self._end, start + size)

    def __getitem__(self, batch: int) -> Tensor | None:
        place = self._places[batch]
        if place is None:
            return None
        start, _, layout = place
        value = torch.empty_strided(layout.shape, layout.stride(), dtype=layout.dtype, device="cpu")
        data = _bytes(value)
        self._file.seek(start)
        while data:
            if not (step := self._file.readinto(data)):
                raise OSError(f"the hidden states of batch {batch} in {self.folder} end {len(data)} bytes early")
            data = data[step:]
        return value


def _bytes(value: Tensor) -> memoryview:
    """The memory of a tensor, in the order in which it lies there."""
    memory = torch.empty(0, dtype=torch.uint8, device="cpu").set_(value.untyped_storage())
    return memoryview(memory.numpy())  # type: ignore[arg-type]
