"""Statistics of the units of each group before a cut: sums of energies or gradients, and scores."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_compress.pruning.importance import unit_gate_gradient, unit_square_sum
from lightning_compress.structure.groups import Group, moved
from lightning_compress.structure.surgery import tensors_of
from lightning_compress.team import Team

__all__ = ["Importance", "UnitStatistics"]

Importance = Literal["magnitude", "taylor", "activation"]


@dataclass
class _UnitSum:
    """Sum of squares for each unit of one group, [U], and the number of tokens or steps."""

    reduce: ClassVar[dict[str, str]] = {"sum_U": "sum", "count": "sum"}

    sum_U: Tensor
    count: int


class UnitStatistics:
    """Sums of squares for each unit of each group, by the name of the group."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # [U]
        self._counts: dict[str, int] = {}  # tokens, or steps

    def add(self, name: str, value_U: Tensor, count: int) -> None:
        """Add the sum of squares of ``count`` tokens or steps."""
        before = self._sums.get(name)
        self._sums[name] = value_U.double() if before is None else before.to(value_U.device) + value_U
        self._counts[name] = self._counts.get(name, 0) + count

    def add_gradients(self, model: nn.Module, groups: Mapping[str, Group]) -> None:
        """Add the gradients of a step for each unit (Taylor)."""
        tensors = tensors_of(model)
        for name, group in groups.items():
            pieces = [(p, tensors[p.tensor]) for p in group.slices if tensors[p.tensor].dim() > 1]
            gates = [unit_gate_gradient(W, W.grad, p.dim, p.index).square() for p, W in pieces if W.grad is not None]
            if gates:
                self.add(name, torch.stack(gates).sum(0), 1)

    def reduce_(self, team: Team, groups: Mapping[str, Group]) -> None:
        """Add up over ranks, on some of which a group may have seen no batch."""
        for name, group in groups.items():
            total = _UnitSum(
                self._sums.get(name, torch.zeros(group.units, dtype=torch.float64, device="cpu")),
                self._counts.get(name, 0),
            )
            team.reduce_(total)
            self._sums[name], self._counts[name] = total.sum_U, total.count

    def scores(self, model: nn.Module, group: Group, importance: Importance) -> Tensor:
        """Importance of each unit, float [U], on the CPU.

        Raises:
            ValueError: The group saw no batch.
        """
        if importance == "magnitude":
            tensors = tensors_of(model)
            matrices = [(p, tensors[p.tensor]) for p in group.slices if tensors[p.tensor].dim() > 1]
            zero = torch.zeros(group.units, dtype=torch.float32, device="cpu")
            if any(W.is_meta for _, W in matrices):
                return zero  # a plan needs the number of units alone
            return sum((unit_square_sum(W, p.dim, p.index).cpu() for p, W in matrices), zero).sqrt()
        if not self._counts.get(group.name):
            raise ValueError(
                f"importance={importance!r}, but {group.name!r} saw no batch before the cut; give a later start, or "
                f"calibration batches"
            )
        return (self._sums[group.name] / self._counts[group.name]).sqrt().cpu()

    def rename(self, path: str, kept: Sequence[int]) -> None:
        """Follow the removal of layers from the list at ``path``: groups in them go, later ones have new names."""
        names = {name: moved(name, path, kept) for name in self._sums}
        self._sums = {new: self._sums[old] for old, new in names.items() if new is not None}
        self._counts = {new: self._counts[old] for old, new in names.items() if new is not None}

    def forget(self, names: Iterable[str]) -> None:
        """Drop the statistics of groups that were cut."""
        for name in names:
            self._sums.pop(name, None)
            self._counts.pop(name, None)

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self._sums), "seen": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums, self._counts = dict(state["sums"]), dict(state["seen"])
