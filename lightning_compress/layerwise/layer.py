"""What a layerwise technique solves, and what it gives back: a weight matrix, the H of its inputs, the new weight.

Shapes: R rows, C columns, P partitions of a grouped convolution.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Hessian", "Layer", "Solved"]


@dataclass(frozen=True)
class Hessian:
    """H = E[x x^T] of the inputs of one or more layers.

    Args:
        H_CC: Float32, both triangles. It may be changed in place.
        tokens: Number of inputs that H is the mean of.
        layers: Names of the layers that receive these inputs.
        halves: H of every second batch and H of the other batches, where the modifier holds batches out.
        D_CC: E[(x_dense - x) x^T], float32, where the dense inputs of all tokens are known.
        D_halves: The same of both halves.
    """

    H_CC: Tensor
    tokens: int
    layers: Sequence[str]
    halves: tuple[Tensor, Tensor] | None = None
    D_CC: Tensor | None = None
    D_halves: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Layer:
    """The weight matrix of a module, one partition of a grouped convolution, or a piece of rows.

    Args:
        name: Dotted name of the module.
        module: The module.
        W_RC: Its rows of the weight, in the dtype of the module; they must not be changed in place.
        rows: Which rows of the module's weight these are.
        common: Result of :meth:`LayerwiseModifier.common` for the module.
    """

    name: str
    module: nn.Module
    W_RC: Tensor
    rows: slice = field(default_factory=lambda: slice(None))
    common: Any = None

    def parts(self, P: int) -> list["Layer"]:
        """The layer itself, or one layer for each of P partitions."""
        if P == 1:
            return [self]
        R = len(self.W_RC) // P
        return [self.of(slice(p * R, (p + 1) * R)) for p in range(P)]

    def of(self, rows: slice) -> "Layer":
        """Some rows of a module's layer."""
        return replace(self, W_RC=self.W_RC[rows], rows=rows)


@dataclass
class Solved:
    """The solution of a layer.

    Args:
        W_RC: The new weight; in the dtype of the module, unless ``write`` converts it.
        error: Trace of (W - Q) H (W - Q)^T, with H as it was before damping; None: not known.
        energy: Trace of W H W^T.
        flag: A remark for the ledger.
        parts: Further tensors with one row for each row of the weight, such as scales.
    """

    W_RC: Tensor
    error: float | None = None
    energy: float = 0.0
    flag: str | None = None
    parts: dict[str, Tensor | None] = field(default_factory=dict)

    @property
    def relative_error(self) -> float | None:
        """The error of the output as a share of the output; None: not known."""
        if self.error is None:
            return None
        return max(0.0, self.error) / max(self.energy, torch.finfo(torch.float32).tiny)

    @classmethod
    def join(cls, each: Sequence["Solved"]) -> "Solved":
        """The solutions of all partitions, or of all pieces of rows, as one."""
        if len(each) == 1:
            return each[0]
        parts: dict[str, Tensor | None] = {}
        for key in each[0].parts:
            tensors = [tensor for solved in each if (tensor := solved.parts[key]) is not None]
            parts[key] = torch.cat(tensors) if tensors else None
        flags = dict.fromkeys(solved.flag for solved in each if solved.flag)
        error = None if any(s.error is None for s in each) else sum(s.error or 0.0 for s in each)
        energy = sum(s.energy for s in each)
        return cls(torch.cat([s.W_RC for s in each]), error, energy, "; ".join(flags) or None, parts)
