"""H = E[x x^T] of layers' inputs, one for all layers that receive the very same tensor.

Where only the blocks H_gg of g columns on the diagonal are needed, each group of columns is a partition
(:func:`groups_as_partitions`): C / g times less work and memory.

The mean is over tokens, independent of batch boundaries and padding. The sum of each input is float32, and these are
added in float64 and rounded once: neither the order of batches nor the number of ranks that have them changes a bit
(float32 sums of two ranks instead of one change a tenth of all codes of GPTQ). Query, key and value projections,
or gate and up, receive one tensor object: their H is accumulated once.

A float64 matrix would take twice the memory of H, so that only its lower triangle is kept, in strips of rows.

Shapes: N tokens, C columns, P partitions of a grouped convolution (1 for all others), T numbers of a triangle.
"""

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_compress.layerwise.dense_inputs import CrossMoment
from lightning_compress.layerwise.layer import Hessian
from lightning_compress.ops.hessian import hessian_accumulate_, mirror_
from lightning_compress.team import Team

__all__ = ["HessianPool", "InputHessian", "NonFiniteHessianError", "SharedHessian",
           "groups_as_partitions", "parted"]  # fmt: skip

ROWS = 1024  # of a float64 sum that are divided at once
STRIP = 128  # rows: X^T X of 576, 1024 or 1536 columns takes equal time in strips of 96 to 128, 192 are slower
SENT = 2**20  # numbers of a sum that are sent at once


class NonFiniteHessianError(ValueError):
    """H is not finite: the inputs are not, or their squares lie beyond float32."""


def groups_as_partitions(X_PNC: Tensor, g: int) -> Tensor:
    """[P * G, N, g]: each group of g columns apart, those of one partition side by side; zeros fill up the last."""
    X_PNC = pad(X_PNC, (0, -X_PNC.shape[2] % g))
    return X_PNC.unflatten(2, (-1, g)).transpose(1, 2).flatten(0, 1)


class InputHessian:
    """The statistic H = sum x x^T / N of one stream of inputs.

    Args:
        partitions: P.
        columns: C.
        device: Device of the inputs.
        cross: D of the same tokens is summed up, too (dense_inputs.py).
    """

    reduce = {"sums_PT": "sum", "tokens": "sum"}

    def __init__(self, partitions: int, columns: int, device: torch.device | str = "cpu", cross: bool = False):
        self.shape = partitions, columns
        self._strip = STRIP if torch.device(device).type == "cpu" else columns  # kernels write into a whole matrix
        numbers = sum((high - low) * high for low, high in self._limits())
        with torch.inference_mode(False):  # it outlives the calibration pass
            self.sums_PT = torch.zeros(partitions, numbers, device=device, dtype=torch.float64)
        self.tokens = 0
        self.cross = CrossMoment(partitions, columns, device) if cross else None

    def update(self, X_PNC: Tensor, dense_PNC: Tensor | None = None) -> None:
        """Add N tokens of any floating dtype, for D those of the dense model, too; their sum is float32.

        Raises:
            NonFiniteHessianError: The tokens hold NaN or Inf, or their squares lie beyond float32; on a GPU only
                :meth:`is_finite` tells.
            ValueError: The tokens have another number of columns.
        """
        P, N, C = X_PNC.shape
        if self.shape != (P, C):
            raise ValueError(
                f"{P} x {C} input columns, expected {self.shape[0]} x {self.shape[1]} as in the inputs before"
            )
        strips = self._strips()
        if P == len(strips) == 1:
            hessian_accumulate_(strips[0][0][0], X_PNC[0])
        else:
            X_PNC = X_PNC.to(torch.promote_types(X_PNC.dtype, torch.float32))
            for sum_PrC, low, high in strips:
                sum_PrC += X_PNC[:, :, low:high].mT @ X_PNC[:, :, :high]
        self.tokens += N
        if dense_PNC is None:
            self.cross = None
        elif self.cross is not None:
            self.cross.update(X_PNC, dense_PNC)
        if not (X_PNC.is_cuda or self.is_finite()):  # a GPU is not waited for in each batch
            if not torch.isfinite(X_PNC).all():
                raise NonFiniteHessianError("holds NaN or Inf")
            raise NonFiniteHessianError(
                f"holds numbers up to {X_PNC.abs().max().item():.3g}, whose squares add up beyond float32; scale its "
                f"inputs down, or add it to ignore"
            )

    def add_(self, other: "InputHessian") -> None:
        """Add the tokens of another statistic."""
        self.sums_PT += other.sums_PT
        self.tokens += other.tokens
        self.cross = None if self.cross is None or other.cross is None else self.cross.add_(other.cross)

    def is_finite(self) -> bool:
        """Whether all sums are finite: any NaN or Inf reaches the diagonal."""
        traces = [sum_PrC[:, :, low:].diagonal(dim1=1, dim2=2).sum() for sum_PrC, low, _ in self._strips()]
        return bool(torch.isfinite(torch.stack(traces).sum()))

    def take(self) -> Tensor:
        """:meth:`value`; afterwards only ``tokens`` of the statistic can be used."""
        H_PCC, self.sums_PT = self.value(), self.sums_PT.new_empty(0)
        return H_PCC

    def cross_value(self) -> Tensor | None:
        """D [P, C, C] in float32; None: not known."""
        return None if self.cross is None else self.cross.value(self.tokens)

    def value(self) -> Tensor:
        """H [P, C, C] in float32, both triangles."""
        P, C = self.shape
        H_PCC = torch.empty(P, C, C, device=self.sums_PT.device, dtype=torch.float32)
        for sum_PrC, low, high in self._strips():
            for row in range(0, high - low, ROWS):  # no second matrix in float64
                rows = slice(low + row, min(low + row + ROWS, high))
                H_PCC[:, rows, :high] = sum_PrC[:, row : row + ROWS] / max(1, self.tokens)
        for H_CC in H_PCC:
            mirror_(H_CC)
        return H_PCC

    def _limits(self) -> Iterator[tuple[int, int]]:
        """First row and end of each strip; it has the columns up to its end."""
        C = self.shape[1]
        for low in range(0, C, self._strip):
            yield low, min(low + self._strip, C)

    def _strips(self) -> list[tuple[Tensor, int, int]]:
        """The sums of each strip [P, r, C up to its end], its first row and its end."""
        limits = list(self._limits())
        sizes = [(high - low) * high for low, high in limits]
        pieces = self.sums_PT.split(sizes, 1)
        return [(piece.unflatten(1, (-1, high)), low, high) for piece, (low, high) in zip(pieces, limits, strict=True)]


class SharedHessian:
    """A statistic and the modules that it belongs to: each must have seen all of its inputs."""

    def __init__(self) -> None:
        self.statistic: InputHessian | None = None  # created with the first rows, which define its size
        self.held_out: InputHessian | None = None  # of every second batch, if inputs are held out
        self.inputs = 0  # number of updates of the statistic
        self.seen: dict[str, set[int]] = {}  # module -> which of these inputs it received
        self.closed = False  # the statistic was used; it cannot grow further
        self.owner: int | None = None  # the rank that has the sum over ranks
        self.shape = (0, 0)  # P, C

    @classmethod
    def of_zeros(cls, P: int, C: int, device: torch.device | str, hold_out: bool, cross: bool) -> "SharedHessian":
        """A statistic without inputs."""
        shared = cls()
        shared.shape = (P, C)
        shared.statistic = InputHessian(P, C, device, cross)
        shared.held_out = InputHessian(P, C, device, cross) if hold_out else None
        return shared

    @property
    def statistics(self) -> list[InputHessian]:
        return [one for one in (self.statistic, self.held_out) if one is not None]

    @property
    def has_cross(self) -> bool:
        """Whether dense inputs came with all inputs."""
        return all(one.cross is not None for one in self.statistics)

    @property
    def members(self) -> list[str]:
        return list(self.seen)

    @property
    def tokens_apart(self) -> tuple[int, int]:
        """Those of the statistic, and those that are held out."""
        counts = [0 if one is None else one.tokens for one in (self.statistic, self.held_out)]
        return counts[0], counts[1]

    @property
    def tokens(self) -> int:
        return sum(self.tokens_apart)

    def is_level(self, name: str) -> bool:
        return len(self.seen[name]) == self.inputs

    @property
    def partitions(self) -> int:
        """P."""
        return self.shape[0]

    def reduce_(self, team: Team, owner: int | None, tokens: tuple[int, int]) -> None:
        """Add up over ranks; where the owner is another rank only ``tokens`` can be used. None: all ranks get it.

        Args:
            team: The ranks.
            owner: The rank that gets the sums.
            tokens: Those of all ranks in the statistic, and in what is held out.
        """
        for one, count in zip((self.statistic, self.held_out), tokens, strict=True):
            if one is not None:
                matrices = [one.sums_PT] if one.cross is None else [one.sums_PT, one.cross.sums_PCC]
                for sums in [piece for matrix in matrices for piece in matrix.flatten().split(SENT)]:
                    team.reduce_(SimpleNamespace(sums=sums, reduce={"sums": "sum"}), owner)
                one.tokens = count
                if owner not in (None, team.rank):
                    one.sums_PT, one.cross = one.sums_PT.new_empty(0), None

    def take(self) -> Iterator[Hessian]:
        """That of each partition; the sums are used up."""
        assert self.statistic is not None
        halves = self.statistics if self.held_out is not None and all(one.tokens for one in self.statistics) else []
        H_halves, D_halves = [half.value() for half in halves], [half.cross_value() for half in halves]
        self.join()
        D_PCC, self.statistic.cross = self.statistic.cross_value(), None
        for p, H_CC in enumerate(self.statistic.take()):
            hessian = Hessian(H_CC, self.statistic.tokens, self.members, _pair(H_halves, p))
            yield hessian if D_PCC is None else replace(hessian, D_CC=D_PCC[p], D_halves=_pair(D_halves, p))

    def join(self) -> None:
        """Add the inputs that were held out."""
        if self.held_out is not None:
            assert self.statistic is not None
            self.statistic.add_(self.held_out)
            self.held_out = None


def _pair(halves: Sequence[Tensor | None], p: int) -> tuple[Tensor, Tensor] | None:
    """One partition of both halves."""
    parts = [half[p] for half in halves if half is not None]
    return (parts[0], parts[1]) if len(parts) == 2 else None


class HessianPool:
    """Statistics by module name; modules are joined by the identity of their input tensors.

    A module joins the statistic of another one when its first input is a tensor object that the other one received, in
    the same layout and not changed in between. From then on both must receive the same tensors.

    Args:
        share: False gives every module a separate statistic.
        hold_out: Inputs of every second batch go to ``SharedHessian.held_out``.
        cross: Cross moments with dense inputs are summed up, too.
    """

    def __init__(self, share: bool = True, hold_out: bool = False, cross: bool = False):
        self.share, self.hold_out, self.cross = share, hold_out, cross
        self._of: dict[str, SharedHessian] = {}
        self._inputs: dict[tuple[int, Hashable], tuple[weakref.ref[Tensor], int, SharedHessian, set[int]]] = {}

    def update(
        self,
        name: str,
        x: Tensor,
        layout: Hashable,
        rows: Callable[[], Tensor],
        batch: int = 0,
        dense_rows: Callable[[], Tensor | None] = lambda: None,
    ) -> None:
        """Module ``name`` received ``x``.

        Args:
            name: The module.
            x: The tensor object that the module received.
            layout: What its rows depend on besides x (the window of a convolution).
            rows: Computes X [P, N, C] of x; called only when the statistic needs it.
            batch: The number of the calibration batch.
            dense_rows: Computes the same rows of the dense model; None: they are not known.

        Raises:
            NonFiniteHessianError: x holds NaN or Inf, or squares beyond float32; names the module and its input.
            ValueError: x has another number of columns, or modules that shared their inputs no longer do.
        """
        key = (id(x), layout)
        shared, indices = self._find(key, x)
        hessian = self._of.get(name)
        if hessian is None:
            hessian = self._of[name] = shared or SharedHessian()
            hessian.seen[name] = set()
        seen = hessian.seen[name]
        if shared is hessian and (new := sorted(indices - seen)):
            seen.add(new[0])
            return
        if hessian.closed or not hessian.is_level(name):
            raise ValueError(_parted(name, hessian))
        X_PNC = rows()
        if hessian.statistic is None:
            shape = X_PNC.shape[0], X_PNC.shape[2]
            zeros = SharedHessian.of_zeros(*shape, X_PNC.device, self.hold_out, self.cross)
            hessian.statistic, hessian.held_out, hessian.shape = zeros.statistic, zeros.held_out, zeros.shape
        statistic = hessian.statistic if hessian.held_out is None or batch % 2 == 0 else hessian.held_out
        assert statistic is not None
        try:
            statistic.update(X_PNC, *([dense_rows()] if self.cross else []))
        except NonFiniteHessianError as error:
            raise NonFiniteHessianError(f"input {hessian.inputs} (counted from 0) of {name!r} {error}") from error
        except ValueError as error:
            raise ValueError(f"input {hessian.inputs} (counted from 0) of {name!r}: {error}") from error
        seen.add(hessian.inputs)
        self._remember(key, x, hessian, hessian.inputs)
        hessian.inputs += 1

    def get(self, name: str) -> SharedHessian | None:
        """The statistic of a module, to be used now (it is closed); None when the module never saw a token.

        Raises:
            NonFiniteHessianError: On a GPU: inputs hold NaN or Inf, or squares beyond float32.
            ValueError: The module missed some of the inputs that the modules it shares with received.
        """
        shared = self._of.get(name)
        if shared is None or not shared.tokens:
            return None
        if not shared.is_level(name):
            raise ValueError(_parted(name, shared))
        sums = [] if shared.closed else [s for s in (shared.statistic, shared.held_out) if s and s.sums_PT.is_cuda]
        if not all(statistic.is_finite() for statistic in sums):
            raise NonFiniteHessianError(
                f"the inputs of {name!r} hold NaN or Inf, or numbers whose squares add up beyond float32; look at the "
                f"calibration batches, scale the inputs down, or add {name!r} to ignore"
            )
        shared.closed = True
        return shared

    def drop(self, *names: str) -> None:
        """Forget modules, and statistics without a module."""
        for name in names:
            self._of.pop(name, None)
        used = {id(s) for s in self._of.values()}
        self._inputs = {k: entry for k, entry in self._inputs.items() if id(entry[2]) in used}

    def alive(self) -> set[str]:
        """Modules whose statistic further modules can join, since an input of it is not deleted."""
        alive = {id(entry[2]) for entry in self._inputs.values() if entry[0]() is not None}
        return {name for name, shared in self._of.items() if id(shared) in alive}

    def drop_stale(self, alive: set[str]) -> None:
        """Forget closed statistics that no further module can join: those without a module in ``alive``."""
        joined = {id(self._of[name]) for name in alive if name in self._of}
        self.drop(*[name for name, shared in self._of.items() if shared.closed and id(shared) not in joined])

    def join(self, name: str, first: str, shape: tuple[int, int], device: torch.device, cross: bool) -> SharedHessian:
        """The statistic of a module, else that of ``first``, else one without inputs; closed.

        Args:
            name: The module.
            first: A module that receives the same inputs.
            shape: P and C.
            device: Device of a new statistic.
            cross: Whether it has a cross moment on all ranks.
        """
        if name not in self._of:
            if first not in self._of:
                self._of[first] = SharedHessian.of_zeros(*shape, device, self.hold_out, cross)
                self._of[first].seen[first] = set()
            self._of[name] = self._of[first]
            self._of[name].seen.setdefault(name, set(range(self._of[name].inputs)))
        shared = self._of[name]
        for one in () if cross else shared.statistics:
            one.cross = None
        shared.closed = True
        return shared

    def _find(self, key: tuple[int, Hashable], x: Tensor) -> tuple[SharedHessian | None, set[int]]:
        """The statistic that received this tensor before, unchanged, and as which of its inputs."""
        entry = self._inputs.get(key) if self.share else None
        if entry is None or entry[0]() is not x or entry[1] != _version(x):
            return None, set()
        return entry[2], entry[3]

    def _remember(self, key: tuple[int, Hashable], x: Tensor, shared: SharedHessian, index: int) -> None:
        previous, indices = self._find(key, x)
        if previous is not shared:
            indices = set()
            self._inputs[key] = (weakref.ref(x), _version(x), shared, indices)
        indices.add(index)


def _parted(name: str, shared: SharedHessian) -> str:
    return parted(name, [other for other in shared.members if other != name])


def parted(name: str, others: Sequence[str]) -> str:
    """The message for modules that shared their inputs and no longer do."""
    return (
        f"{name!r} received the same input tensor as {', '.join(map(repr, others)) or 'itself'} in some calibration "
        f"batches, but not in all: one statistic cannot serve both; set share_inputs=False"
    )


def _version(x: Tensor) -> int:
    """Counts changes in place. Tensors made under inference_mode keep no count: they are taken as unchanged."""
    return 0 if x.is_inference() else x._version
