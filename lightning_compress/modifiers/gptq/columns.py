"""The column loop of GPTQ: round a column, hand its error on to the columns still to come (see modifier.py).

The loop works on W^T, whose columns lie contiguous: a block of 128 columns is the op gptq_block, and a GEMM hands its
errors on to all columns after it.

Shapes: R rows, C columns (inputs), G groups of g columns.
"""

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from lightning_compress.layerwise.factor import Factor, energy
from lightning_compress.ops.gptq_block import Grid, gptq_block_
from lightning_compress.quant.formats import is_microscaled
from lightning_compress.quant.scales import expand, group_columns, integer_range

__all__ = ["adjusted", "grid_of", "output_error", "round_columns"]


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
        zero_point: As scale, or None.
        args: The grid.
        factor: Of the damped H.
        block: Columns after which errors reach all columns still to come.
        dtype: In which the result is stored: errors are measured against what will be stored.
        keep_RC: False where the result is zero, and the columns still to come make up for it; bool, or None.

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
    scale_GR, zero_GR = (
        None if s is None else expand(s, R, args).to(W_RC.dtype).t().contiguous() for s in (scale, zero_point)
    )
    keep_CR = None if keep_RC is None else keep_RC.t().index_select(0, factor.order_C)
    grid = grid_of(args, W_RC.dtype if dtype is None else dtype)
    for i1 in range(0, C, block):
        i2 = min(i1 + block, C)
        here = slice(i1, i2)
        gptq_block_(
            A_CR[here], Q_CR[here], D_bR[: i2 - i1], W_CR[here], U_CC[here, here], grid, scale_GR, zero_GR,
            group_C[here], None if keep_CR is None else keep_CR[here],
        )  # fmt: skip
        if i2 < C:
            A_CR[i2:].addmm_(U_CC[here, i2:].t(), D_bR[: i2 - i1])
    loss_R = factor.pivot_C.square() @ A_CR.sub_(Q_CR).square_()
    A_CR.index_copy_(0, factor.order_C, Q_CR)  # back into the order of the columns
    return A_CR.t().contiguous(), loss_R


def output_error(W_RC: Tensor, Q_RC: Tensor, loss_R: Tensor, factor: Factor) -> tuple[float, float]:
    """The traces of (W - Q) H (W - Q)^T and of W H W^T, with H as it was before damping.

    The second costs half as much as the column loop. A sample of rows will not do: single rows carry most of it, and
    128 of 576 rows of SmolLM2's projections were off by up to a factor of four.

    Args:
        W_RC: The weight.
        Q_RC: What GPTQ made of it.
        loss_R: (w - q) H (w - q)^T of each row with the damped H.
        factor: Of the damped H.
    """
    error = loss_R - (W_RC - Q_RC).square_() @ factor.added_C
    total = energy(W_RC, factor) - W_RC.square() @ factor.added_C
    return max(0.0, float(error.sum())), float(total.sum())


def adjusted(W_RC: Tensor, Q_RC: Tensor, factor: Factor) -> Tensor:
    """a_j = w_j + sum_{k<j} (w_k - q_k) U_kj, [R, C]: what was rounded to Q, column after column.

    Args:
        W_RC: The weight.
        Q_RC: What GPTQ made of it.
        factor: Of the damped H.
    """
    W_RC, D_RC = (t.index_select(1, factor.order_C) for t in (W_RC, W_RC - Q_RC))
    A_RC = torch.addmm(W_RC, D_RC, factor.UT_CC.tril(-1).t())
    return torch.empty_like(A_RC).index_copy_(1, factor.order_C, A_RC)


def grid_of(args: QuantizationArgs, stored: torch.dtype) -> Grid:
    """What the op rounds to; ``stored`` is the dtype in which values are kept."""
    return Grid(*integer_range(args), args.num_bits if args.type == "float" else 0, stored, is_microscaled(args))
