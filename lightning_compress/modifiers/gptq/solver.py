"""From the weights of layers that share their inputs to points of the grid: scales, the column loop, refinement.

Shapes: R rows, C columns, P partitions of a grouped convolution (1 for all other modules), K proposals of scales.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from lightning_compress.layerwise.factor import Factor
from lightning_compress.modifiers.gptq.columns import adjusted, grid_of, round_columns
from lightning_compress.modifiers.gptq.refinement import refine, weighted_error
from lightning_compress.quant.rounding import find_scales
from lightning_compress.quant.scales import expand

__all__ = ["ScaleSearch", "Solved", "Solver", "damped", "error_on"]

PROPOSALS_UP_TO = 3  # bits; see Solver._proposals
STACKED = 4096  # rows of one column loop: as fast as 9216 at 576 columns (0.13 s), at half the memory

Scales = tuple[Tensor, Tensor | None]  # scale and zero point
ScaleSearch = Literal["minmax", "mse", "hessian"]


@dataclass(frozen=True)
class Solved:
    """Weights on their grid, the rows of all modules stacked.

    Args:
        W_RC: The weights as they were, float32.
        Q_RC: What became of them.
        loss_R: (w - q) H (w - q)^T of each row, with the damped H.
        scales: Of each module, as they are stored.
        rows: Of each module.
        keep_RC: False where Q is zero because it had to be; None: nowhere.
    """

    W_RC: Tensor
    Q_RC: Tensor
    loss_R: Tensor
    scales: Sequence[Scales]
    rows: Sequence[int]
    keep_RC: Tensor | None

    def latents(self, factors: Sequence[Factor]) -> Tensor:
        """The values that were rounded, column after column, [R, C]; zero where Q had to be."""
        P = len(factors)
        parts = zip(self.W_RC.chunk(P), self.Q_RC.chunk(P), factors, strict=True)
        A_RC = torch.cat([adjusted(*part) for part in parts])
        return A_RC if self.keep_RC is None else A_RC.mul_(self.keep_RC)


@dataclass(frozen=True)
class Solver:
    """GPTQ for modules of one scheme and one H.

    Args:
        args: The grid.
        scale_search: ``minmax``, ``mse`` or ``hessian``.
        block_size: Columns after which errors reach all columns still to come.
    """

    args: QuantizationArgs
    scale_search: ScaleSearch
    block_size: int = 128

    def __call__(
        self,
        matrices: Sequence[Tensor],
        factors: Sequence[Factor],
        global_scales: Sequence[Tensor | None],
        keeps: Sequence[Tensor],
    ) -> Solved:
        """One column loop for all modules.

        Args:
            matrices: The weight of each module, [rows, C].
            factors: Of the damped H, one for each partition.
            global_scales: Of formats that have one, by module.
            keeps: False where a weight is to stay zero, by module.
        """
        rows = [len(W_RC) for W_RC in matrices]
        pairs = zip(matrices, global_scales, strict=True)
        proposed = list(zip(*[self._proposals(W_RC, factors, g) for W_RC, g in pairs], strict=True))
        W_RC = (torch.cat(list(matrices)) if len(matrices) > 1 else matrices[0]).float()
        keep_RC = torch.cat(list(keeps)) if any(not keep.all() for keep in keeps) else None
        tried = []
        for found in proposed:  # the scales of all these modules, found in one way
            scale_RG = torch.cat([expand(scale, R, self.args) for (scale, _), R in zip(found, rows, strict=True)])
            zeros = [expand(zero, R, self.args) for (_, zero), R in zip(found, rows, strict=True) if zero is not None]
            tried.append((scale_RG, torch.cat(zeros) if zeros else None))
        Q_RC, loss_R, best_R = self._best_rows(W_RC, tried, factors, matrices[0].dtype, keep_RC)
        scales = proposed[0] if best_R is None else _chosen(tried, best_R, rows)
        return Solved(W_RC, Q_RC, loss_R, scales, rows, keep_RC)

    def refined(self, solved: Solved, H_PCC: Tensor, dtype: torch.dtype) -> Solved:
        """Scales refitted and codes improved, where that lowers the loss of a row.

        Args:
            solved: The start.
            H_PCC: The damped H of each partition.
            dtype: Of the weights and their scales.
        """
        P = len(H_PCC)
        scale_RG, zero_RG = _stacked(solved, self.args)
        zeros, keeps = ([None] * P if whole is None else whole.chunk(P) for whole in (zero_RG, solved.keep_RC))
        nearest = grid_of(self.args, dtype).nearest_
        parts = [
            refine(W, Q, scale, zero, self.args, H_CC, nearest, dtype, keep)
            for W, Q, scale, zero, H_CC, keep in zip(
                solved.W_RC.chunk(P), solved.Q_RC.chunk(P), scale_RG.chunk(P), zeros, H_PCC, keeps, strict=True
            )
        ]
        Q_RC, loss_R = torch.cat([Q for Q, _, _ in parts]), torch.cat([loss for _, _, loss in parts])
        each = torch.cat([scale for _, scale, _ in parts]).to(dtype).split(list(solved.rows))
        scales = [(scale.contiguous(), zero) for scale, (_, zero) in zip(each, solved.scales, strict=True)]
        return Solved(solved.W_RC, Q_RC, loss_R, scales, solved.rows, solved.keep_RC)

    def _proposals(self, W_RC: Tensor, factors: Sequence[Factor], global_scale: Tensor | None) -> list[Scales]:
        """Scales and zero points of one module, each found in another way, the first by ``scale_search``.

        The diagonal of H knows nothing of what later columns make good: where inputs are strongly correlated and bits
        are few, it shrinks too far. Measured, KL to the dense model with min-max scales / with those of the diagonal /
        chosen by row: the demo's Llama at 2 bits .0033 / .0250 / .0034, at 3 bits .00053 / .00076 / .00043; SmolLM2 at
        3 bits 1.6 / .49 / .50. So up to 3 bits ``hessian`` proposes both and their geometric mean, and each row takes
        what loses least. At 4 bits that fits the calibration data and nothing else: SmolLM2 with 4096 tokens .246 /
        .122 / .137 (worse on each of three subsets), for a column loop that takes more than twice as long.
        """
        args = self.args
        scale, zero_point = self._scales(W_RC, factors, global_scale)
        if self.scale_search != "hessian" or args.strategy == "tensor" or args.num_bits > PROPOSALS_UP_TO:
            return [(scale, zero_point)]
        widest, widest_zero = find_scales(W_RC, args, "minmax")
        if zero_point is not None:  # two ranges have no mean with a zero point of its own
            return [(scale, zero_point), (widest, widest_zero)]
        mean = (scale.float() * widest.float()).sqrt().to(scale.dtype)
        return [(scale, None), (mean, None), (widest, None)]

    def _scales(self, W_RC: Tensor, factors: Sequence[Factor], global_scale: Tensor | None) -> Scales:
        """Scales of one module; each partition of a grouped convolution weighs errors by its own inputs."""
        if self.args.strategy in ("tensor", "block") or len(factors) == 1:
            importance_C = torch.stack([factor.diagonal_C for factor in factors]).mean(0)
            return find_scales(W_RC, self.args, self.scale_search, importance_C, global_scale)
        parts = [
            find_scales(W, self.args, self.scale_search, factor.diagonal_C, global_scale)
            for W, factor in zip(W_RC.chunk(len(factors)), factors, strict=True)
        ]
        zeros = [zero_point for _, zero_point in parts if zero_point is not None]
        return torch.cat([scale for scale, _ in parts]), torch.cat(zeros) if zeros else None

    def _best_rows(
        self,
        W_RC: Tensor,
        tried: Sequence[Scales],
        factors: Sequence[Factor],
        dtype: torch.dtype,
        keep_RC: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Q [R, C] and losses [R] with the scales that lose least in each row, and which these were, int64 [R].

        Rows do not know of each other, so all proposals go through one column loop, stacked; many rows in pieces.
        """
        if len(tried) == 1:
            Q_RC, loss_R = self._columns(W_RC, *tried[0], factors, dtype, keep_RC)
            return Q_RC, loss_R, None
        K, R, P = len(tried), len(W_RC), len(factors)
        if P == 1 and (piece := STACKED // K) < R:
            found = []
            for i in range(0, R, piece):
                rows = slice(i, i + piece)
                some = [(scale[rows], None if zero is None else zero[rows]) for scale, zero in tried]
                keep = None if keep_RC is None else keep_RC[rows]
                found.append(self._best_rows(W_RC[rows], some, factors, dtype, keep))
            best = [b for _, _, b in found if b is not None]
            return torch.cat([q for q, _, _ in found]), torch.cat([x for _, x, _ in found]), torch.cat(best)

        def stacked(matrices: Sequence[Tensor]) -> Tensor:
            """[K * R, ...], partition by partition, as the factors want their rows."""
            return torch.stack([m.unflatten(0, (P, -1)) for m in matrices], 1).flatten(0, 2)

        zeros = [zero for _, zero in tried if zero is not None]
        Q_XC, loss_X = self._columns(
            stacked([W_RC] * K),
            stacked([scale for scale, _ in tried]),
            stacked(zeros) if zeros else None,
            factors,
            dtype,
            None if keep_RC is None else stacked([keep_RC] * K),
        )
        loss_KR = loss_X.view(P, K, R // P).transpose(0, 1).flatten(1)
        Q_KRC = Q_XC.unflatten(0, (P, K, R // P)).transpose(0, 1).flatten(1, 2)
        best_R = loss_KR.argmin(0)
        row_R = torch.arange(R, device=best_R.device)
        return Q_KRC[best_R, row_R], loss_KR[best_R, row_R], best_R

    def _columns(
        self,
        W_RC: Tensor,
        scale_RG: Tensor,
        zero_RG: Tensor | None,
        factors: Sequence[Factor],
        dtype: torch.dtype,
        keep_RC: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """:func:`round_columns`, for each partition with its own factor."""
        if len(factors) == 1:
            return round_columns(W_RC, scale_RG, zero_RG, self.args, factors[0], self.block_size, dtype, keep_RC)
        P = len(factors)
        zeros, keeps = ([None] * P if whole is None else whole.chunk(P) for whole in (zero_RG, keep_RC))
        parts = [
            round_columns(W, scale, zero_point, self.args, factor, self.block_size, dtype, keep)
            for W, scale, zero_point, factor, keep in zip(
                W_RC.chunk(P), scale_RG.chunk(P), zeros, factors, keeps, strict=True
            )
        ]
        return torch.cat([Q for Q, _ in parts]), torch.cat([loss for _, loss in parts])


def error_on(W_RC: Tensor, Q_RC: Tensor, H_PCC: Tensor) -> Tensor:
    """(w - q) H (w - q)^T of each row, [R], each partition with its own H."""
    P = len(H_PCC)
    return torch.cat([weighted_error(W, Q, H) for W, Q, H in zip(W_RC.chunk(P), Q_RC.chunk(P), H_PCC, strict=True)])


def damped(H_PCC: Tensor, factors: Iterable[Factor]) -> Tensor:
    """H as it was factored, [P, C, C]: a copy with what was added to its diagonal."""
    H_PCC = H_PCC.clone()
    for H_CC, factor in zip(H_PCC, factors, strict=True):
        H_CC.diagonal().add_(factor.added_C)
    return H_PCC


def _stacked(solved: Solved, args: QuantizationArgs) -> Scales:
    """Scales and zero points of all rows, [R, G] each."""
    each = list(zip(solved.scales, solved.rows, strict=True))
    zeros = [expand(zero, R, args) for (_, zero), R in each if zero is not None]
    return torch.cat([expand(scale, R, args) for (scale, _), R in each]), torch.cat(zeros) if zeros else None


def _chosen(tried: Sequence[Scales], best_R: Tensor, rows: Sequence[int]) -> list[Scales]:
    """Scale and zero point of each module: row r from proposal ``best_R[r]``."""
    row_R = torch.arange(len(best_R), device=best_R.device)
    scales = torch.stack([scale for scale, _ in tried])[best_R, row_R].split(rows)
    zeros = [zero for _, zero in tried if zero is not None]
    if not zeros:
        return [(scale.contiguous(), None) for scale in scales]
    points = torch.stack(zeros)[best_R, row_R].split(rows)
    return [(scale.contiguous(), zero.contiguous()) for scale, zero in zip(scales, points, strict=True)]
