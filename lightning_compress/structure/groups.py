"""A group: indices of several tensors that can only be removed together, unit by unit.

A unit is a neuron of an MLP, a channel of a convolution, or a key/value head with its queries. Removing unit u removes
``index[u]`` along ``dim`` of every slice of the group.

Shapes: U units, K indices of one unit in one tensor (head_dim for heads, height x width after a flatten).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Cut", "Group", "Slice", "cut_of", "group_from_state", "group_state", "moved", "renumbered", "units_to_keep",
           "without_layers"]  # fmt: skip

Cut = dict[str, dict[int, Tensor]]
"""For each tensor, by dotted name, and each dimension that shrinks: the indices that stay, int64, ascending."""


@dataclass(frozen=True)
class Slice:
    """Indices of the units of a group in one tensor."""

    tensor: str  # dotted name of the parameter or buffer
    dim: int  # dimension that shrinks
    index: Tensor  # indices of each unit, int64 [U, K]
    consumer: bool = False  # the module of this tensor reads the units as its input


@dataclass(frozen=True)
class Group:
    """Units that can be removed one by one."""

    name: str  # of the module that computes the units, for messages and the ledger
    dense: int  # number of units of the dense model
    slices: tuple[Slice, ...]  # indices of the units in every tensor that has weights of them

    @property
    def units(self) -> int:
        return len(self.slices[0].index)


def units_to_keep(dense: int, ratio: float, round_to: int) -> int:
    """How many of ``dense`` units stay without the share ``ratio``, rounded up to a multiple of ``round_to``."""
    count = dense - int(ratio * dense + 1e-9)
    return min(dense, -(-count // round_to) * round_to)


def cut_of(remaining: Sequence[tuple[Group, Tensor]], sizes: Mapping[str, Sequence[int]]) -> Cut:
    """The indices of every tensor that stay when units (int64, ascending) of each group stay; ``sizes``: shapes."""
    masks: dict[str, dict[int, Tensor]] = {}
    for group, units in remaining:
        removed = torch.ones(group.units, dtype=torch.bool, device="cpu")
        removed[units] = False
        for piece in group.slices:
            along = masks.setdefault(piece.tensor, {})
            mask = along.setdefault(
                piece.dim, torch.ones(sizes[piece.tensor][piece.dim], dtype=torch.bool, device="cpu")
            )
            mask[piece.index[removed].flatten()] = False
    return {
        name: {dim: mask.nonzero().flatten() for dim, mask in along.items() if not mask.all()}
        for name, along in masks.items()
        if any(not mask.all() for mask in along.values())
    }


def renumbered(group: Group, units: Tensor | None, cut: Cut) -> Group:
    """The group as it is after ``cut``; ``units`` of it stay (None: all)."""
    slices = []
    for piece in group.slices:
        index = piece.index if units is None else piece.index[units]
        remaining = cut.get(piece.tensor, {}).get(piece.dim)
        slices.append(replace(piece, index=index if remaining is None else torch.searchsorted(remaining, index)))
    return replace(group, slices=tuple(slices))


def moved(name: str, path: str, kept: Sequence[int]) -> str | None:
    """The name of a module or tensor after only ``kept`` of the layers in ``path`` stay; None when it is removed."""
    index, _, rest = name.removeprefix(f"{path}.").partition(".")
    if not name.startswith(f"{path}.") or not index.isdigit():
        return name
    if int(index) not in kept:
        return None
    return f"{path}.{list(kept).index(int(index))}" + (f".{rest}" if rest else "")


def without_layers(group: Group, path: str, kept: Sequence[int]) -> Group | None:
    """The group after only ``kept`` of the layers in ``path`` stay; None when its module is removed."""
    name = moved(group.name, path, kept)
    tensors = [(piece, moved(piece.tensor, path, kept)) for piece in group.slices]
    slices = tuple(replace(piece, tensor=tensor) for piece, tensor in tensors if tensor is not None)
    return None if name is None or not slices else replace(group, name=name, slices=slices)


def group_state(groups: Iterable[Group]) -> list[dict[str, Any]]:
    """Groups as primitives and tensors, for checkpoints."""
    return [
        {"name": group.name, "dense": group.dense, "slices": [{**vars(piece)} for piece in group.slices]}
        for group in groups
    ]


def group_from_state(state: list[dict[str, Any]]) -> list[Group]:
    """The reverse of :func:`group_state`."""
    return [Group(g["name"], g["dense"], tuple(Slice(**piece) for piece in g["slices"])) for g in state]
