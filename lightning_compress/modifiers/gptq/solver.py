"""From the weights of layers that share their inputs to points of the grid: scales, then the column loop.

The loop works on W^T, so that columns are contiguous: the op gptq_block rounds a block of 128 columns, and a GEMM adds
its errors to all later columns. The letters are those of modifier.py.

Shapes: R rows, C columns (inputs), G groups of g columns, K proposals of scales.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from lightning_compress.layerwise.factor import Factor, energy
from lightning_compress.ops.gptq_block import Block, Grid, Rounding, gptq_block_
from lightning_compress.quant.formats import is_microscaled
from lightning_compress.quant.rounding import find_scales
from lightning_compress.quant.scales import expand, group_columns, integer_range

__all__ = ["Matrix", "OnGrid", "ScaleSearch", "Scales", "Solver", "adjusted", "grid_of", "keep_of", "output_error",
           "round_columns", "rows_of"]  # fmt: skip

PROPOSALS_UP_TO = 3  # bits; see Solver._proposals
STACKED = 4096  # rows of one column loop: as fast as 9216 at 576 columns (0.13 s), at half the memory

Scales = tuple[Tensor, Tensor | None]  # scale and zero point
ScaleSearch = Literal["minmax", "mse", "hessian"]


@dataclass(frozen=True)
class Matrix:
    """A weight to be solved.

    Args:
        W_RC: The weight, in the dtype of its layer.
        keep_RC: False where the weight stays zero; None: nowhere.
        global_scale: Global scale, in formats that have one.
        scales: Fixed scales [R, G], with their zero points; None: they are searched.
    """

    W_RC: Tensor
    keep_RC: Tensor | None
    global_scale: Tensor | None = None
    scales: Scales | None = None


@dataclass(frozen=True)
class OnGrid:
    """A solved weight.

    Args:
        W_RC: The dense weight, float32.
        Q_RC: Its points of the grid, float32.
        loss_R: (w - q) H (w - q)^T of each row, with the damped H.
        scale: The scale as it is stored.
        zero_point: The zero point as it is stored, or None.
    """

    W_RC: Tensor
    Q_RC: Tensor
    loss_R: Tensor
    scale: Tensor
    zero_point: Tensor | None


@dataclass(frozen=True)
class Solver:
    """GPTQ for weights of one grid and one H.

    Args:
        args: The grid.
        scale_search: ``minmax``, ``mse`` or ``hessian``.
        block_size: Number of columns after which errors are added to all later columns.
    """

    args: QuantizationArgs
    scale_search: ScaleSearch
    block_size: int = 128

    def __call__(self, matrices: Sequence[Matrix], factor: Factor) -> list[OnGrid]:
        """One column loop for all weights, with the factor of the damped H."""
        weights = [matrix.W_RC for matrix in matrices]
        W_RC = (torch.cat(weights) if len(weights) > 1 else weights[0]).float()
        keep_RC = keep_of(matrices)
        proposals = list(zip(*[self._proposals(matrix, factor) for matrix in matrices], strict=True))
        tried = [self.by_row(scales, matrices) for scales in proposals]
        Q_RC, loss_R, best_R = self._best_rows(W_RC, tried, factor, matrices[0].W_RC.dtype, keep_RC)
        rows = [len(matrix.W_RC) for matrix in matrices]
        scales = proposals[0] if best_R is None else _chosen(tried, best_R, rows)
        pieces = zip(W_RC.split(rows), Q_RC.split(rows), loss_R.split(rows), scales, strict=True)
        return [OnGrid(W, Q, loss, *scale) for W, Q, loss, scale in pieces]

    def common_scales(self, W_RC: Tensor, factors: Sequence[Factor], global_scale: Tensor | None) -> Scales | None:
        """Scales that rows of several partitions share, chosen by the mean diagonal of H; None: no shared scales."""
        if self.args.strategy not in ("tensor", "block"):
            return None
        diagonal_C = torch.stack([factor.diagonal_C for factor in factors]).mean(0)
        return find_scales(W_RC, self.args, self.scale_search, diagonal_C, global_scale)

    def _proposals(self, matrix: Matrix, factor: Factor) -> list[Scales]:
        """Proposals of scales and zero points for one weight, the first by ``scale_search``.

        The diagonal of H ignores that later columns correct errors: with strongly correlated inputs and few bits it
        shrinks scales too far. Measured, KL to the dense model with min-max scales / with those of the diagonal /
        chosen by row: the demo's Llama at 2 bits .0033 / .0250 / .0034, at 3 bits .00053 / .00076 / .00043; SmolLM2 at
        3 bits 1.6 / .49 / .50. So up to 3 bits ``hessian`` proposes both and their geometric mean, and each row takes
        the one with the least loss. At 4 bits that overfits: SmolLM2 with 4096 tokens .246 / .122 / .137 (worse on each
        of three subsets), for a column loop that takes more than twice as long.
        """
        if matrix.scales is not None:
            return [matrix.scales]
        args = self.args
        scale, zero_point = find_scales(matrix.W_RC, args, self.scale_search, factor.diagonal_C, matrix.global_scale)
        if self.scale_search != "hessian" or args.strategy == "tensor" or args.num_bits > PROPOSALS_UP_TO:
            return [(scale, zero_point)]
        widest, widest_zero = find_scales(matrix.W_RC, args, "minmax")
        if zero_point is not None:  # the mean of two scales has no zero point
            return [(scale, zero_point), (widest, widest_zero)]
        mean = (scale.float() * widest.float()).sqrt().to(scale.dtype)
        return [(scale, None), (mean, None), (widest, None)]

    def by_row(self, scales: Sequence[Scales], matrices: Sequence[Matrix]) -> Scales:
        """Scales and zero points of all rows, [R, G] each."""
        rows = [len(matrix.W_RC) for matrix in matrices]
        scale_RG = torch.cat([expand(scale, R, self.args) for (scale, _), R in zip(scales, rows, strict=True)])
        zeros = [expand(zero, R, self.args) for (_, zero), R in zip(scales, rows, strict=True) if zero is not None]
        return scale_RG, torch.cat(zeros) if zeros else None

    def _best_rows(
        self, W_RC: Tensor, tried: Sequence[Scales], factor: Factor, dtype: torch.dtype, keep_RC: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Q [R, C] and losses [R] with the scales of least loss in each row, and the index of the proposal, [R].

        Rows are independent, so all proposals go through one column loop, stacked; many rows in pieces.
        """
        if len(tried) == 1:
            return *round_columns(W_RC, *tried[0], self.args, factor, self.block_size, dtype, keep_RC), None
        K, pieces = len(tried), []
        for i in range(0, len(W_RC), STACKED // K):
            rows = slice(i, i + STACKED // K)
            zeros = [zero[rows] for _, zero in tried if zero is not None]
            scales = torch.cat([scale[rows] for scale, _ in tried]), torch.cat(zeros) if zeros else None
            keep_XC = None if keep_RC is None else torch.cat([keep_RC[rows]] * K)
            W_XC = torch.cat([W_RC[rows]] * K)
            Q_XC, loss_X = round_columns(W_XC, *scales, self.args, factor, self.block_size, dtype, keep_XC)
            Q_KRC, loss_KR = Q_XC.unflatten(0, (K, -1)), loss_X.view(K, -1)
            best_R, row_R = loss_KR.argmin(0), torch.arange(loss_KR.shape[1], device=loss_KR.device)
            pieces.append((Q_KRC[best_R, row_R], loss_KR[best_R, row_R], best_R))
        Q_RC, loss_R, best = (torch.cat(tensors) for tensors in zip(*pieces, strict=True))
        return Q_RC, loss_R, best


def round_columns(
    W_RC: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    args: QuantizationArgs,
    factor: Factor,
    block: int = 128,
    dtype: torch.dtype | None = None,
    keep_RC: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """GPTQ with fixed scales.

    Args:
        W_RC: Weights, in the dtype of the factor.
        scale: [R, G], [R, 1] or [1], already rounded to the dtype that stores it.
        zero_point: Zero points in the shape of ``scale``, or None.
        args: The grid.
        factor: Factor of the damped H.
        block: Number of columns after which errors are added to all later columns.
        dtype: Dtype in which the result is stored: errors are measured against the stored values.
        keep_RC: False where the result is zero, which later columns correct; bool, or None.

    Returns:
        Q [R, C], dequantized, and for each row the loss (w - q) H (w - q)^T with the damped H, [R].
    """
    R, C = W_RC.shape
    W_CR = W_RC.t().contiguous().index_select(0, factor.order_C)
    A_CR, Q_CR, U_CC = W_CR.clone(), torch.empty_like(W_CR), factor.UT_CC.t()
    if W_CR.is_cuda:
        U_CC = U_CC.contiguous()  # kernels read its rows
    D_bR = W_CR.new_empty(min(block, C), R)
    group_C = factor.order_C // group_columns(args, C)

    def by_group(s: Tensor) -> Tensor:
        return expand(s, R, args).to(W_RC.dtype).t().contiguous()

    scale_GR, zero_GR = by_group(scale), None if zero_point is None else by_group(zero_point)
    keep_CR = None if keep_RC is None else keep_RC.t().index_select(0, factor.order_C)
    grid = grid_of(args, W_RC.dtype if dtype is None else dtype)
    for i1 in range(0, C, block):
        i2 = min(i1 + block, C)
        b = slice(i1, i2)
        keep_bR = None if keep_CR is None else keep_CR[b]
        columns = Block(A_CR[b], Q_CR[b], D_bR[: i2 - i1], W_CR[b], U_CC[b, b], keep_bR)
        gptq_block_(columns, Rounding(grid, scale_GR, zero_GR, group_C[b]))
        if i2 < C:
            A_CR[i2:].addmm_(U_CC[b, i2:].t(), D_bR[: i2 - i1])
    loss_R = factor.pivot_C.square() @ A_CR.sub_(Q_CR).square_()
    A_CR.index_copy_(0, factor.order_C, Q_CR)  # back into the order of the columns
    return A_CR.t().contiguous(), loss_R


def output_error(solved: OnGrid, factor: Factor) -> tuple[float, float]:
    """The traces of (W - Q) H (W - Q)^T and of W H W^T, with H before damping; ``factor`` is that of the damped H.

    The second costs half as much as the column loop, 3.4 % of a GPTQ run on SmolLM2 (1.2 of 34 CPU seconds): the loop
    makes (W - Q) U alone, and W U is another product. A sample of rows is not enough: single rows carry most of it, and
    128 of 576 rows of SmolLM2's projections were off by up to a factor of four.
    """
    error_R = solved.loss_R - (solved.W_RC - solved.Q_RC).square_() @ factor.added_C
    energy_R = energy(solved.W_RC, factor) - solved.W_RC.square() @ factor.added_C
    error, total = torch.stack([error_R.sum(), energy_R.sum()]).tolist()  # a GPU is waited for once
    return max(0.0, error), total


def adjusted(W_RC: Tensor, Q_RC: Tensor, factor: Factor) -> Tensor:
    """a_j = w_j + sum_{k<j} (w_k - q_k) U_kj, [R, C]: the values that GPTQ rounded to Q; factor of the damped H."""
    W_RC, D_RC = (t.index_select(1, factor.order_C) for t in (W_RC, W_RC - Q_RC))
    A_RC = torch.addmm(W_RC, D_RC, factor.UT_CC.tril(-1).t())
    return torch.empty_like(A_RC).index_copy_(1, factor.order_C, A_RC)


def grid_of(args: QuantizationArgs, stored: torch.dtype) -> Grid:
    """The grid of the op; ``stored`` is the dtype of the stored values."""
    return Grid(*integer_range(args), args.num_bits if args.type == "float" else 0, stored, is_microscaled(args))


def rows_of(scales: Scales, rows: slice, R: int, args: QuantizationArgs) -> Scales:
    """Some rows of the scales and zero points of R rows, [rows, G]."""
    scale, zero_point = scales
    return expand(scale, R, args)[rows], None if zero_point is None else expand(zero_point, R, args)[rows]


def keep_of(matrices: Sequence[Matrix]) -> Tensor | None:
    """False where a weight stays zero, [R, C] of all rows; None: no weight has to."""
    if all(matrix.keep_RC is None or bool(matrix.keep_RC.all()) for matrix in matrices):
        return None
    keeps = [torch.ones_like(m.W_RC, dtype=torch.bool) if m.keep_RC is None else m.keep_RC for m in matrices]
    return torch.cat(keeps)


def _chosen(tried: Sequence[Scales], best_R: Tensor, rows: Sequence[int]) -> list[Scales]:
    """Scale and zero point of each weight: row r from proposal ``best_R[r]``."""
    row_R = torch.arange(len(best_R), device=best_R.device)

    def select(each: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.contiguous() for tensor in torch.stack(list(each))[best_R, row_R].split(list(rows))]

    scales, zeros = select([scale for scale, _ in tried]), [zero for _, zero in tried if zero is not None]
    return list(zip(scales, select(zeros) if zeros else [None] * len(rows), strict=True))
