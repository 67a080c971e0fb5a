"""The column loop of GPTQ: round a column, hand its error on to the columns still to come (see modifiers/gptq.py).

The loop works on W^T, whose columns lie contiguous, and hands errors on in two levels: within 16 columns one by one,
to the rest of the block of 128 by a GEMM every 16 columns, to all others by a GEMM every block.

Shapes: R rows, C columns (inputs), G groups of g columns.
"""

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from lightning_compress.maths.factor import Factor, energy
from lightning_compress.quant.formats import is_microscaled, round_float_, stored_as
from lightning_compress.quant.scales import expand, group_columns, integer_range

__all__ = ["Nearest", "adjusted", "output_error", "round_columns"]

SUB_BLOCK = 16


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
    A_CR, Q_CR, UT_CC = W_CR.clone(), torch.empty_like(W_CR), factor.UT_CC
    D_bR = W_CR.new_empty(min(block, C), R)
    groups = (factor.order_C // group_columns(args, C)).tolist()
    scales = [s.contiguous() for s in expand(scale, R, args).to(W_RC.dtype).unbind(1)]
    zeros = None
    if zero_point is not None:
        zeros = [z.contiguous() for z in expand(zero_point, R, args).to(W_RC.dtype).unbind(1)]
    gone = None if keep_RC is None else (~keep_RC).t().index_select(0, factor.order_C).unbind(0)
    nearest_ = Nearest(args, W_RC.dtype if dtype is None else dtype)
    a_rows, q_rows, w_rows, d_rows = A_CR.unbind(0), Q_CR.unbind(0), W_CR.unbind(0), D_bR.unbind(0)
    for i1 in range(0, C, block):
        i2 = min(i1 + block, C)
        for j1 in range(i1, i2, SUB_BLOCK):
            j2 = min(j1 + SUB_BLOCK, i2)
            # From column k to all of the sub-block, zero up to k itself: to add zeros there is quicker than to slice.
            hand_on = UT_CC[j1:j2, j1:j2].tril(-1).t().contiguous().unbind(0)
            A_sub = A_CR[j1:j2]
            for j in range(j1, j2):
                group, a, q, d = groups[j], a_rows[j], q_rows[j], d_rows[j - i1]
                nearest_(a, scales[group], None if zeros is None else zeros[group], q)
                if gone is not None:
                    q.masked_fill_(gone[j], 0)
                torch.sub(w_rows[j], q, out=d)
                A_sub.addr_(hand_on[j - j1], d)
            if j2 < i2:
                A_CR[j2:i2].addmm_(UT_CC[j2:i2, j1:j2], D_bR[j1 - i1 : j2 - i1])
        if i2 < C:
            A_CR[i2:].addmm_(UT_CC[i2:, i1:i2], D_bR[: i2 - i1])
    loss_R = factor.pivot_C.square() @ A_CR.sub_(Q_CR).square_()
    A_CR.index_copy_(0, factor.order_C, Q_CR)                                  # back into the order of the columns
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


class Nearest:
    """Nearest grid point of a column, written into ``out``, in the order of operations of compressed-tensors."""

    def __init__(self, args: QuantizationArgs, stored: torch.dtype):
        self.low, self.high = integer_range(args)
        self.args, self.stored = args, stored

    def __call__(self, a_R: Tensor, s_R: Tensor, z_R: Tensor | None, out: Tensor) -> None:
        torch.div(a_R, s_R, out=out)
        if self.args.type == "float":
            round_float_(out, self.args.num_bits)
        elif z_R is None:
            out.round_().clamp_(self.low, self.high)
        else:
            out.add_(z_R).round_().clamp_(self.low, self.high).sub_(z_R)
        out.mul_(s_R)
        if self.stored != out.dtype or is_microscaled(self.args):
            out.copy_(stored_as(out, self.args, self.stored))
