"""Layers of several ranks: the sum of a Hessian goes to its owner, who solves all its layers; results go to all.

Ranks run different batches, so each has a part of every sum. An expert that got no token on a rank has no part there,
and that rank does not know which layers receive one tensor: so the ranks compare first what each of them has.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_compress.layers.matrix import as_matrix
from lightning_compress.layerwise.input_hessian import HessianPool, SharedHessian, parted
from lightning_compress.quant.module_state import from_tensors, settle, to_tensors
from lightning_compress.team import Team

__all__ = ["Owners", "Part", "from_owner", "gather_hessians"]

T = TypeVar("T")
COLUMN = 1e6  # multiplications in the time that one column takes beside them (AMD EPYC, one thread: 25 us)
RELAYED = 4e7  # the same for rank 0, which passes on what ranks say of a layer, for each rank beyond two (1 ms)
# Multiplications of the smallest piece that another rank takes. CPU: 0.08 s; two ranks that shared 4096 rows of 512
# (1024) columns took 22 (66) ms of CPU time more in all, and the busier one 36 (87) ms less.
WORTH = {"cpu": 3e9}
WORTH_ON_GPU = 1e11  # a guess: 2 ms


@dataclass(frozen=True)
class Part:
    """What one rank has of the Hessian of a layer.

    Args:
        first: The first layer that received these inputs.
        tokens: Inputs on this rank, and those that are held out; after the sum is made of all ranks.
        shape: Partitions and columns.
        owner: The rank that has the sum; None: it is not made yet.
        cross: Whether dense inputs came with all of them.
    """

    first: str
    tokens: tuple[int, int]
    shape: tuple[int, int]
    owner: int | None
    cross: bool = False

    @classmethod
    def of(cls, shared: SharedHessian) -> "Part":
        return cls(shared.members[0], shared.tokens_apart, shared.shape, shared.owner, shared.has_cross)


class Owners:
    """Gives each Hessian to the rank that has had the least work; the same on every rank."""

    def __init__(self) -> None:
        self._work: list[float] = []

    def next(self, team: Team) -> int:
        self._work += [0.0] * (team.size - len(self._work))
        return min(range(team.size), key=self._work.__getitem__)

    def note(self, owner: int, cost: float) -> None:
        """The owner has so much work more, in multiplications."""
        self._work[owner] += cost

    def deal(self, team: Team, owner: int, rows: Sequence[int], C: int, device: str) -> list[int]:
        """The rank of each piece of a layer, whose work has been noted for its owner.

        Args:
            team: The ranks.
            owner: The owner of the layer's Hessian.
            rows: Number of rows of each piece.
            C: Columns of the layer.
            device: Type of its device.
        """
        costs = [work_of(R, C) for R in rows]
        if team.alone or len(rows) == 1 or min(costs) < WORTH.get(device, WORTH_ON_GPU):
            return [owner] * len(rows)
        self.note(owner, -sum(costs))
        order = sorted(range(team.size), key=self._work.__getitem__)
        ranks = [order[i % team.size] for i in range(len(rows))]  # no rank waits for one with two pieces
        for rank, cost in zip(ranks, costs, strict=True):
            self.note(rank, cost)
        return ranks


def work_of(R: int, C: int) -> float:
    """The work of R rows and C columns, in multiplications."""
    return (R * C + COLUMN) * C


def gather_hessians(
    team: Team, pool: HessianPool, layers: Mapping[str, nn.Module], owners: Owners | None
) -> dict[str, SharedHessian]:
    """The Hessians of those layers that have seen data on any rank; every rank calls it, with the same layers.

    Args:
        team: The ranks.
        pool: Statistics of this rank.
        layers: The layers, by name.
        owners: Each sum goes to one rank; None: all ranks get all sums.

    Raises:
        ValueError: Layers received one tensor on one rank, and different tensors on another.
    """
    present = {name: shared for name in layers if (shared := pool.get(name)) is not None}
    ranks = team.gather(({n: Part.of(s) for n, s in present.items()}, pool.alive()), "statistics of layers")
    pool.drop_stale({*layers, *[name for _, alive in ranks for name in alive]})
    hessians = {}
    for name, module in layers.items():
        parts = [parts[name] for parts, _ in ranks if name in parts]
        if not parts:
            continue
        if others := sorted({part.first for part in parts} - {parts[0].first}):
            raise ValueError(parted(name, [other for other in {parts[0].first, *others} if other != name]))
        part = next((part for part in parts if part.owner is not None), parts[0])
        W_RC, (P, C) = as_matrix(module), part.shape
        work, cross = work_of(len(W_RC), C), all(part.cross for part in parts)
        shared = hessians[name] = pool.join(name, part.first, part.shape, W_RC.device, cross)
        if shared.owner is None and part.owner is None:
            shared.owner = 0 if owners is None else owners.next(team)
            first, held_out = (sum(counts) for counts in zip(*[part.tokens for part in parts], strict=True))
            shared.reduce_(team, None if owners is None else shared.owner, (first, held_out))
            work += P * C**3 / 3
        elif shared.owner is None:  # made before this rank had a part
            assert shared.statistic is not None
            shared.owner, shared.statistic.tokens = part.owner, sum(part.tokens)
        if owners is not None and shared.owner is not None:
            owners.note(shared.owner, work)
            owners.note(0, RELAYED * (team.size - 2))
    return hessians


def from_owner(
    team: Team, modules: Mapping[str, nn.Module], owner: int, work: Callable[[], T | None], what: str
) -> T | None:
    """Result of ``work`` of one rank, on all of them, and these modules as it left them, packed where quantized.

    Args:
        team: The ranks.
        modules: The modules that ``work`` changes.
        owner: The rank that does the work.
        work: Its result is pickled; None: the modules are as they were.
        what: Name of the work, for the message of the other ranks when it fails.
    """
    if team.alone:
        return work()
    sources: dict[str, Tensor] = {}

    def outcome() -> tuple[T | None, dict[str, tuple[torch.Size, torch.dtype]], dict[str, Any]]:
        if (value := work()) is None:
            return None, {}, {}
        tensors, facts = to_tensors(modules)
        sources.update(tensors)
        return value, {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}, facts

    value, shapes, facts = team.result(outcome, what, owner)
    if value is None:
        return None
    tensors = {
        name: sources.get(name, torch.empty(shape, dtype=dtype, device="cpu"))
        for name, (shape, dtype) in shapes.items()
    }
    team.broadcast_(list(tensors.values()), owner)
    if team.rank == owner:
        settle(modules, tensors, facts)
    else:
        from_tensors(modules, tensors, facts)
    return value
