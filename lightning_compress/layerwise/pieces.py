"""Large layers are solved in fixed pieces of rows, and several ranks share the pieces.

    owner        factors H, sends what is needed of it
    each rank    solves its pieces, sends their rows
    owner        joins the rows, writes the layer, sends it packed (owners.py)

The rows of a piece depend on the shapes and the kind of device alone, and one process solves the same pieces: products
of other row counts may round otherwise (777 rows in pieces of 64: 1 % of all sums differ on an AMD EPYC).
"""

import io
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_compress.team import Team

__all__ = ["collect", "cut", "share"]

T = TypeVar("T")
Outline = tuple[bytes, list[tuple[torch.Size, tuple[int, ...], torch.dtype, bool]]]
"""A pickled value without its tensors; of these shape, strides, dtype, and whether they are on the CPU."""

# Rows of the smallest piece. CPU: 4096 rows in 2 pieces take 0.96, 1.01, 0.92 and 0.96 of the CPU seconds of one piece
# at 512, 1024, 2048 and 4096 columns, in 4 pieces 1.09, 1.12, 0.95 and 0.94. On a GPU columns follow one another too;
# that fewer rows do not fill one is a guess.
ROWS = {"cpu": 2048}
ROWS_ON_GPU = 8192
ALIGNED = 64


def cut(rows: Sequence[int], device: str) -> list[list[tuple[int, slice]]]:
    """Pieces of weights that are solved together: in each the numbers of the weights and their rows.

    Args:
        rows: Number of rows of each weight.
        device: Type of their device.
    """
    count = max(1, sum(rows) // ROWS.get(device, ROWS_ON_GPU))
    size = math.ceil(sum(rows) / count / ALIGNED) * ALIGNED
    pieces = []
    for low in range(0, sum(rows), size):
        piece, first = [], 0
        for i, R in enumerate(rows):
            start, stop = max(low - first, 0), min(low + size - first, R)
            if start < stop:
                piece.append((i, slice(start, stop)))
            first += R
        pieces.append(piece)
    return pieces


def share(team: Team, owner: int, work: Callable[[], T], device: torch.device, what: str) -> T:
    """Result of ``work`` of one rank, on all of them; tensors keep their strides, on which a product's bits depend.

    Args:
        team: The ranks.
        owner: The rank that does the work.
        work: Its result is pickled, but for its tensors.
        device: Of this rank, for tensors that are not on the CPU.
        what: Name of the work, for the message of the other ranks when it fails.
    """
    sources: list[Tensor] = []
    outline = team.result(lambda: _take_apart(work(), sources), what, owner)
    tensors = sources if team.rank == owner else _room(outline, device)
    team.broadcast_([_in_memory_order(tensor) for tensor in tensors], owner)
    return _put_together(outline, tensors)


def collect(
    team: Team, owner: int, ranks: Sequence[int], solve: Callable[[int], T], device: torch.device, what: str
) -> list[T]:
    """Results of pieces that several ranks solve, on the owner; on other ranks an empty list.

    Args:
        team: The ranks.
        owner: The rank that gets the results.
        ranks: The rank of each piece.
        solve: Solves a piece, by its number.
        device: Of this rank, for tensors that are not on the CPU.
        what: Name of the work, for the message of the other ranks when it fails.
    """
    sources: list[Tensor] = []
    mine = [i for i, rank in enumerate(ranks) if rank == team.rank]
    outlines = team.results(lambda: _take_apart([solve(i) for i in mine], sources), what)
    results: dict[int, list[T]] = {}
    for rank in sorted(set(ranks)):
        if team.rank not in (rank, owner):
            continue
        tensors = sources if team.rank == rank else _room(outlines[rank], device)
        if rank != owner:
            team.carry_([_in_memory_order(tensor) for tensor in tensors], rank, owner)
        results[rank] = _put_together(outlines[rank], tensors)
    if team.rank != owner:
        return []
    places = [ranks[:i].count(rank) for i, rank in enumerate(ranks)]
    return [results[rank][place] for rank, place in zip(ranks, places, strict=True)]


class _Pickler(pickle.Pickler):
    """Writes the number of a tensor instead of its values."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]):
        super().__init__(file)
        self.tensors = tensors

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]):
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self.tensors[number]


def _take_apart(value: Any, tensors: list[Tensor]) -> Outline:
    """The outline of a value, whose tensors are appended to ``tensors``."""
    file = io.BytesIO()
    _Pickler(file, tensors).dump(value)
    return file.getvalue(), [(t.shape, t.stride(), t.dtype, t.device.type == "cpu") for t in tensors]


def _room(outline: Outline, device: torch.device) -> list[Tensor]:
    """Memory for the tensors of an outline."""
    return [
        torch.empty_strided(shape, stride, dtype=dtype, device="cpu" if on_cpu else device)
        for shape, stride, dtype, on_cpu in outline[1]
    ]


def _in_memory_order(tensor: Tensor) -> Tensor:
    """The tensor with its dimensions in the order of their strides: one transposed needs no copy to be sent."""
    return tensor.permute(sorted(range(tensor.ndim), key=lambda d: -tensor.stride()[d]))


def _put_together(outline: Outline, tensors: Sequence[Tensor]) -> Any:
    return _Unpickler(io.BytesIO(outline[0]), tensors).load()
