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

__all__ = ["Candidate", "Errors", "FormErrors", "GridErrors", "Summed", "Tall", "integer_range"]

Candidate = tuple[float | Tensor, float | Tensor]
"""A factor and a shift of the zero point, for all rows or for each of them, [r]."""


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
        block: Number of groups whose errors are computed at a time; None: all of them.
        scratch: Memory that is overwritten, float32 [2, weights of a block or more]; pieces that are used one after the
            other may share it.
    """

    above, finer = 1.0, 1  # the first factor, relative to the usual one; steps for each usual step

    def __init__(
        self,
        t: Tensor,
        z: Tensor | None,
        h: Tensor,
        power: float,
        args: QuantizationArgs,
        block: int | None = None,
        scratch: Tensor | None = None,
    ):
        groups, rows, g = self.shape = t.shape
        self.t, self.h, self.power, self.args = t.flatten(0, 1), h, power, args
        self.z = None if z is None else z.reshape(-1, 1)
        self.rows, self.device = len(self.t), t.device
        self.narrows = not t.is_cuda  # rows can be left out; on CUDA the host would wait for their number
        self.worth = 0.3 if power == 2 and args.type == "int" else 0.7  # share of rows that pays for leaving out others
        self.low, self.high = integer_range(args)
        self.block = groups if block is None else min(block, groups)
        self.scratch = t.new_empty(2, self.block * rows * g) if scratch is None else scratch
        self.blocks = [_Block(self, slice(i, min(i + self.block, groups))) for i in range(0, groups, self.block)]

    def __call__(self, f_r: float | Tensor, shift: float | Tensor) -> Tensor:
        """[r] for one factor for all rows, or one for each, [r]; inf where the shifted zero point leaves the range."""
        return self.each([(f_r, shift)])[0]

    def each(self, candidates: Sequence[Candidate]) -> Tensor:
        """The errors of several factors and shifts, [candidates, r]."""
        sums, columns = self._sums(len(candidates)), [(_column(f), _column(shift)) for f, shift in candidates]
        for block in self.blocks:
            for (f, shift), out in zip(columns, sums, strict=True):
                q = self._codes(block, f, shift)
                if isinstance(f, Tensor):
                    q.mul_(f[block.rows]).sub_(block.t)
                else:
                    torch.sub(block.t, q, alpha=f, out=q)
                self._loss(block, out[block.rows])
        for (_, shift), out in zip(columns, sums, strict=True):
            if self.z is not None and (isinstance(shift, Tensor) or shift):
                z = (self.z + shift)[:, 0]
                out.masked_fill_((z < self.low) | (z > self.high), math.inf)
        return sums

    def clipped(self, f: float) -> Tensor:
        """A bound below the errors for f and all lower factors, [r]: what weights outside of the grid lose.

        NaN where none is outside, if p is not 2.
        """
        low, high, (sums, counts) = self.low * f, self.high * f, self._sums(2)
        for block in self.blocks:
            if block.z is None:
                torch.clamp(block.t, low, high, out=block.e)
            else:
                torch.clamp(block.t, low - f * block.z, high - f * block.z, out=block.e)
            block.e.sub_(block.t).square_()
            block.weighted(block.e, sums[block.rows])
            if self.power != 2:
                block.weighted(block.e.ne_(0), counts[block.rows])
        if self.power == 2:
            return sums
        # E[x^p] >= E[x^2]^(p/2) over the weights outside; pow for all takes as long as ten multiplications
        return sums.div_(counts).pow_(self.power / 2).mul_(counts)

    def narrowed(self, keep: Tensor) -> "tuple[Tensor, GridErrors] | None":
        """Index of the rows that stay, [n], and their errors; None where fewer rows would not save much.

        Equally many rows of each group stay, a multiple of 8: then the order of their sums does not change.
        """
        groups, rows, _ = self.shape
        keep = keep.view(groups, rows)
        count = min(-(-max(1, int(keep.sum(1).max())) // 8) * 8, rows)
        if count > self.worth * rows:
            return None
        index = keep.float().topk(count, sorted=False).indices
        index = (index + torch.arange(0, self.rows, rows, device=self.device)[:, None]).flatten()
        t = self.t.index_select(0, index).view(groups, count, -1)
        z = None if self.z is None else self.z[index].view(groups, count)
        return index, GridErrors(t, z, self.h, self.power, self.args, self.block * rows // count, self.scratch)

    def fit(self, f_r: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """sum_j h_j t_j c_j and sum_j h_j c_j^2 of each row, [r], with the codes c of these factors."""
        (above, below), f_r, shift = self._sums(2), f_r[:, None], shift[:, None]
        for block in self.blocks:
            q = self._codes(block, f_r, shift)
            block.weighted(torch.mul(q, block.t, out=block.other), above[block.rows])
            block.weighted(q.square_(), below[block.rows])
        return above, below

    def _codes(self, block: "_Block", f: float | Tensor, shift: float | Tensor) -> Tensor:
        """The codes of a block, without their zero points, in the place of its errors."""
        q = torch.mul(block.t, 1 / (f[block.rows] if isinstance(f, Tensor) else f), out=block.e)
        if self.args.type == "float":
            return round_float_(q, self.args.num_bits)
        if block.z is None:
            return q.round_().clamp_(self.low, self.high)
        z = block.z + (shift[block.rows] if isinstance(shift, Tensor) else shift)
        return q.add_(z).round_().clamp_(self.low, self.high).sub_(z)

    def _loss(self, block: "_Block", out: Tensor) -> None:
        """Write the loss of each row of a block; its errors are overwritten."""
        block.weighted(block.e.square_() if self.power == 2 else block.e.abs_().pow_(self.power), out)

    def _sums(self, count: int) -> Tensor:
        return self.t.new_empty(count, self.rows)


class _Block:
    """Some groups of a piece, whose errors are computed together.

    Attributes:
        groups: Which.
        rows: Their rows.
        t: Their weights, [rows, g].
        z: Zero points [rows, 1], or None.
        h: [groups, g].
        e: Memory for errors, [rows, g].
        other: Memory for other values, [rows, g].
    """

    def __init__(self, errors: "GridErrors", groups: slice):
        rows = errors.shape[1]
        self.groups, self.rows = groups, slice(groups.start * rows, groups.stop * rows)
        self.t, self.z = errors.t[self.rows], None if errors.z is None else errors.z[self.rows]
        self.e, self.other = (memory[: self.t.numel()].view_as(self.t) for memory in errors.scratch)
        self.h = errors.h[groups]
        self._pieces, self._h = self.e.chunk(len(self.h)), self.h.unbind()

    def weighted(self, values: Tensor, out: Tensor) -> None:
        """Write sum_j h_j v_j of each row into [rows] of this block."""
        n = len(self.h)
        if values.is_cuda:
            torch.bmm(values.unflatten(0, (n, -1)), self.h[:, :, None], out=out.view(n, -1, 1))
            return
        pieces = self._pieces if values is self.e else values.chunk(n)
        for v, h, sums in zip(pieces, self._h, out.chunk(n), strict=True):  # a batched product takes five times as long
            torch.mv(v, h, out=sums)


class Summed:
    """Several pieces as if they were one row: one scale per tensor."""

    narrows = False

    def __init__(self, pieces: Sequence[GridErrors]):
        self.pieces, self.power, self.args, self.z = pieces, pieces[0].power, pieces[0].args, pieces[0].z
        self.above, self.finer = pieces[0].above, pieces[0].finer
        self.rows, self.device = 1, pieces[0].device

    def each(self, candidates: Sequence[Candidate]) -> Tensor:
        pieces = [[error.sum() for error in piece.each(candidates)] for piece in self.pieces]
        return torch.stack([torch.stack(sums).sum(0, keepdim=True) for sums in zip(*pieces, strict=True)])

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
        self,
        t: Tensor,
        z: Tensor | None,
        H_Ggg: Tensor,
        args: QuantizationArgs,
        block: int | None = None,
        scratch: Tensor | None = None,
    ):
        super().__init__(t, z, H_Ggg.diagonal(dim1=1, dim2=2), 2.0, args, block, scratch)
        self.H_Ggg = H_Ggg
        self.narrows = False  # errors of different columns may cancel, so what is clipped is not a bound

    def fit(self, f_r: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """t H c^T and c H c^T of each row, [r], with the codes c of these factors."""
        (above, below), f_r, shift = self._sums(2), f_r[:, None], shift[:, None]
        for block in self.blocks:
            q = self._codes(block, f_r, shift)
            turned = self._turned(block, q)
            torch.linalg.vecdot(block.t, turned, out=above[block.rows])
            torch.linalg.vecdot(q, turned, out=below[block.rows])
        return above, below

    def _loss(self, block: _Block, out: Tensor) -> None:
        torch.linalg.vecdot(block.e, self._turned(block, block.e), out=out)
        out.clamp_(min=0)  # rounding can make it negative

    def _turned(self, block: _Block, e: Tensor) -> Tensor:
        """e H of each row, [r, g]."""
        H_Ggg = self.H_Ggg[block.groups]
        return (e.unflatten(0, (len(H_Ggg), -1)) @ H_Ggg).flatten(0, 1)


class Tall:
    """Blocks of b rows of ``piece``, which follow one another, as if each were one row: one scale per block."""

    narrows = False

    def __init__(self, piece: GridErrors, b: int):
        self.piece, self.b, self.power, self.args, self.z = piece, b, piece.power, piece.args, piece.z
        self.rows, self.device, self.above, self.finer = piece.rows // b, piece.device, piece.above, piece.finer

    def each(self, candidates: Sequence[Candidate]) -> Tensor:
        each = self.piece.each([(self._each(f), self._each(shift)) for f, shift in candidates])
        return torch.stack([error.view(-1, self.b).sum(1) for error in each])

    def fit(self, f: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        above, below = self.piece.fit(f.repeat_interleave(self.b), shift.repeat_interleave(self.b))
        return above.view(-1, self.b).sum(1), below.view(-1, self.b).sum(1)

    def _each(self, v: float | Tensor) -> float | Tensor:
        return v.repeat_interleave(self.b) if isinstance(v, Tensor) else v


Errors = GridErrors | Summed | Tall


def _column(v: float | Tensor) -> float | Tensor:
    return v[:, None] if isinstance(v, Tensor) else v
