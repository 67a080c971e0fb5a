"""The error of a candidate scale, row by row, which the search of quant/scales.py minimizes.

    diagonal     sum_j h_j |w_j - q_j|^p            imatrix; h = 1 for plain clipping
    whole H      e H e^T,  e = w - q                the error of the layer's output from a group, correlations included

Both are in units of the min-max scale: t = w / s, and a candidate is a factor f of s and a shift of the zero point.

Shapes: r rows of all groups of one piece, g columns of a group, b rows of a block.
"""

import math
from collections.abc import Sequence

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_range
from torch import Tensor

from lightning_compress.quant.formats import round_float_

__all__ = ["Errors", "FormErrors", "GridErrors", "Summed", "Tall", "integer_range"]


def integer_range(args: QuantizationArgs) -> tuple[float, float]:
    """Lowest and highest code; for floats the lowest and highest finite value."""
    low, high = calculate_range(args, "cpu")
    return float(low), float(high)


class GridErrors:
    """errors(f, dz)[r] = sum_j h_j |t_j - Q(t_j; f, z + dz)|^p of one piece, in units of the min-max scale.

    Args:
        t: Weights divided by their min-max scale, [groups, rows, g]; r runs over both.
        z: Zero points [groups, rows], or None.
        h: [groups, g].
        power: p.
        args: The grid.
    """

    above, finer = 1.0, 1  # the first factor, relative to the usual one; steps for each usual step

    def __init__(self, t: Tensor, z: Tensor | None, h: Tensor, power: float, args: QuantizationArgs):
        self.t, self.h, self.power, self.args = t.flatten(0, 1), h, power, args
        self.z = None if z is None else z.reshape(-1, 1)
        self.rows, self.device = len(self.t), t.device
        self.low, self.high = integer_range(args)
        self.buffer = torch.empty_like(self.t)

    def __call__(self, f_r: float | Tensor, shift: float | Tensor) -> Tensor:
        """[r] for one factor for all rows, or one for each, [r]; inf where the shifted zero point leaves the range."""
        f = _column(f_r)
        q = self._codes(f, shift)
        e = q.mul_(f).sub_(self.t) if isinstance(f, Tensor) else torch.sub(self.t, q, alpha=f, out=q)
        sums = self._sums(e)
        if self.z is not None:
            z = (self.z + _column(shift))[:, 0]
            sums.masked_fill_((z < self.low) | (z > self.high), math.inf)
        return sums

    def fit(self, f_r: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """sum_j h_j t_j c_j and sum_j h_j c_j^2 of each row, [r], with the codes c of these factors."""
        q = self._codes(_column(f_r), shift)
        return self._weighted(self.t * q), self._weighted(q.square_())

    def _sums(self, e: Tensor) -> Tensor:
        """The loss of each row, [r], from its errors, which may be overwritten."""
        return self._weighted(e.mul_(e) if self.power == 2 else e.abs_().pow_(self.power))

    def _weighted(self, e: Tensor) -> Tensor:
        """sum_j h_j e_j of each row; a product per group, since one batched product takes five times as long."""
        return torch.cat([e_r @ h for e_r, h in zip(e.chunk(len(self.h)), self.h, strict=True)])

    def _codes(self, f: float | Tensor, shift: float | Tensor) -> Tensor:
        q = torch.mul(self.t, 1 / f, out=self.buffer)
        if self.args.type == "float":
            return round_float_(q, self.args.num_bits)
        if self.z is None:
            return q.round_().clamp_(self.low, self.high)
        z = self.z + _column(shift)
        return q.add_(z).round_().clamp_(self.low, self.high).sub_(z)


class Summed:
    """Several pieces as if they were one row: one scale per tensor."""

    def __init__(self, pieces: Sequence[GridErrors]):
        self.pieces, self.power, self.args, self.z = pieces, pieces[0].power, pieces[0].args, pieces[0].z
        self.above, self.finer = pieces[0].above, pieces[0].finer
        self.rows, self.device = 1, pieces[0].device

    def __call__(self, f: float | Tensor, shift: float | Tensor) -> Tensor:
        return torch.stack([piece(f, shift).sum() for piece in self.pieces]).sum(0, keepdim=True)

    def fit(self, f: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        sums = [[s.sum() for s in piece.fit(f, shift)] for piece in self.pieces]
        above, below = (torch.stack(column).sum(0, keepdim=True) for column in zip(*sums, strict=True))
        return above, below


class FormErrors(GridErrors):
    """errors(f, dz)[r] = e H e^T with e = t - Q(t; f, z + dz), in units of the min-max scale.

    ``H_Ggg`` is the second moment of each group's inputs, float32 [groups, g, g]; the others as for
    :class:`GridErrors`.
    """

    # Correlated inputs make the loss rugged, and favour larger scales. Planted data, groups of 64, loss over that of
    # 400 factors: 1.017, 1.031, 1.07 at 2, 3, 4 bits by the usual walk, 1.006, 1.011, 1.022 or less by this one.
    above, finer = 1.25, 3

    def __init__(self, t: Tensor, z: Tensor | None, H_Ggg: Tensor, args: QuantizationArgs):
        super().__init__(t, z, H_Ggg.diagonal(dim1=1, dim2=2), 2.0, args)
        self.H_Ggg = H_Ggg

    def fit(self, f_r: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """t H c^T and c H c^T of each row, [r], with the codes c of these factors."""
        q = self._codes(_column(f_r), shift)
        turned = self._turned(q)
        return torch.linalg.vecdot(self.t, turned), torch.linalg.vecdot(q, turned)

    def _sums(self, e: Tensor) -> Tensor:
        return torch.linalg.vecdot(e, self._turned(e)).clamp_(min=0)  # rounding can make it negative

    def _turned(self, e: Tensor) -> Tensor:
        """e H of each row, [r, g]."""
        return (e.unflatten(0, (len(self.H_Ggg), -1)) @ self.H_Ggg).flatten(0, 1)


class Tall:
    """Blocks of b rows of ``piece``, which follow one another, as if each were one row: one scale per block."""

    def __init__(self, piece: GridErrors, b: int):
        self.piece, self.b, self.power, self.args, self.z = piece, b, piece.power, piece.args, piece.z
        self.rows, self.device, self.above, self.finer = piece.rows // b, piece.device, piece.above, piece.finer

    def __call__(self, f: float | Tensor, shift: float | Tensor) -> Tensor:
        return self.piece(self._each(f), self._each(shift)).view(-1, self.b).sum(1)

    def fit(self, f: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        above, below = self.piece.fit(f.repeat_interleave(self.b), shift.repeat_interleave(self.b))
        return above.view(-1, self.b).sum(1), below.view(-1, self.b).sum(1)

    def _each(self, v: float | Tensor) -> float | Tensor:
        return v.repeat_interleave(self.b) if isinstance(v, Tensor) else v


Errors = GridErrors | Summed | Tall


def _column(v: float | Tensor) -> float | Tensor:
    return v[:, None] if isinstance(v, Tensor) else v
