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
        scratch: Memory that is overwritten, float32 [2, size of t or more]; pieces that are used one after the other
            may share it.
    """

    above, finer = 1.0, 1  # the first factor, relative to the usual one; steps for each usual step

    def __init__(
        self,
        t: Tensor,
        z: Tensor | None,
        h: Tensor,
        power: float,
        args: QuantizationArgs,
        scratch: Tensor | None = None,
    ):
        self.shape, self.t, self.h, self.power, self.args = t.shape, t.flatten(0, 1), h, power, args
        self.z = None if z is None else z.reshape(-1, 1)
        self.rows, self.device = len(self.t), t.device
        self.narrows = not t.is_cuda  # rows can be left out; on CUDA the host would wait for their number
        self.low, self.high = integer_range(args)
        self.scratch = t.new_empty(2, t.numel()) if scratch is None else scratch
        self.buffer, self.sums = self.scratch[0, : t.numel()].view_as(self.t), t.new_empty(self.rows)
        self.products = list(zip(self.buffer.chunk(len(h)), h.unbind(), self.sums.chunk(len(h)), strict=True))

    def __call__(self, f_r: float | Tensor, shift: float | Tensor) -> Tensor:
        """[r] for one factor for all rows, or one for each, [r]; inf where the shifted zero point leaves the range.

        The next call overwrites the result.
        """
        f = _column(f_r)
        q = self._codes(f, shift)
        if isinstance(f, Tensor):
            q.mul_(f).sub_(self.t)
        else:
            torch.sub(self.t, q, alpha=f, out=q)
        sums = self._loss()
        if self.z is not None and (isinstance(shift, Tensor) or shift):
            z = (self.z + _column(shift))[:, 0]
            sums.masked_fill_((z < self.low) | (z > self.high), math.inf)
        return sums

    def clipped(self, f: float) -> Tensor:
        """A bound below the errors for f and all lower factors, [r]: what weights outside of the grid lose.

        NaN where none is outside, if p is not 2.
        """
        low, high = self.low * f, self.high * f
        if self.z is None:
            e = torch.clamp(self.t, low, high, out=self.buffer).sub_(self.t)
        else:
            e = torch.clamp(self.t, low - f * self.z, high - f * self.z, out=self.buffer).sub_(self.t)
        e.mul_(e)
        if self.power == 2:
            return self._weighted()
        # E[x^p] >= E[x^2]^(p/2) over the weights outside; pow for all takes as long as ten multiplications
        squares = self._weighted().clone()
        e.ne_(0)
        return squares.div_(self._weighted()).pow_(self.power / 2).mul_(self.sums)

    def narrowed(self, keep: Tensor) -> "tuple[Tensor, GridErrors] | None":
        """Index of the rows that stay, [n], and their errors; None where fewer rows would not save much.

        Equally many rows of each group stay, a multiple of 8: then the order of their sums does not change.
        """
        groups, rows, g = self.shape
        keep = keep.view(groups, rows)
        count = min(-(-max(1, int(keep.sum(1).max())) // 8) * 8, rows)
        if count > 0.7 * rows:
            return None
        index = keep.float().topk(count, sorted=False).indices
        index = (index + torch.arange(0, self.rows, rows, device=self.device)[:, None]).flatten()
        n = len(index)
        torch.index_select(self.t, 0, index, out=self.buffer[:n])  # t itself may be in scratch[1]
        t = self.scratch[1, : n * g].copy_(self.scratch[0, : n * g]).view(groups, count, g)
        z = None if self.z is None else self.z[index].view(groups, count)
        return index, GridErrors(t, z, self.h, self.power, self.args, self.scratch)

    def fit(self, f_r: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """sum_j h_j t_j c_j and sum_j h_j c_j^2 of each row, [r], with the codes c of these factors."""
        q = self._codes(_column(f_r), shift)
        squares = torch.mul(q, q, out=self.scratch[1, : q.numel()].view_as(q))
        q.mul_(self.t)
        above = self._weighted().clone()
        q.copy_(squares)
        return above, self._weighted()

    def _loss(self) -> Tensor:
        """The loss of each row, [r], from its errors, which are in the buffer and are overwritten."""
        if self.power == 2:
            self.buffer.mul_(self.buffer)
        else:
            self.buffer.abs_().pow_(self.power)
        return self._weighted()

    def _weighted(self) -> Tensor:
        """sum_j h_j b_j of each row of the buffer, [r]; the next call overwrites it."""
        if self.buffer.is_cuda:
            torch.bmm(self.buffer.view(self.shape), self.h[:, :, None], out=self.sums.view(len(self.h), -1, 1))
            return self.sums
        for b_r, h, out in self.products:  # one batched product takes five times as long
            torch.mv(b_r, h, out=out)
        return self.sums

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

    narrows = False

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

    def __init__(
        self, t: Tensor, z: Tensor | None, H_Ggg: Tensor, args: QuantizationArgs, scratch: Tensor | None = None
    ):
        super().__init__(t, z, H_Ggg.diagonal(dim1=1, dim2=2), 2.0, args, scratch)
        self.H_Ggg = H_Ggg
        self.narrows = False  # errors of different columns may cancel, so what is clipped is not a bound

    def fit(self, f_r: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """t H c^T and c H c^T of each row, [r], with the codes c of these factors."""
        q = self._codes(_column(f_r), shift)
        turned = self._turned(q)
        return torch.linalg.vecdot(self.t, turned), torch.linalg.vecdot(q, turned)

    def _loss(self) -> Tensor:
        e = self.buffer
        return torch.linalg.vecdot(e, self._turned(e)).clamp_(min=0)  # rounding can make it negative

    def _turned(self, e: Tensor) -> Tensor:
        """e H of each row, [r, g]."""
        return (e.unflatten(0, (len(self.H_Ggg), -1)) @ self.H_Ggg).flatten(0, 1)


class Tall:
    """Blocks of b rows of ``piece``, which follow one another, as if each were one row: one scale per block."""

    narrows = False

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
