"""The block in torch, on any device, on two levels: on W^T, whose columns are contiguous.

Within a sub-block of 16 columns errors are added one column at a time, to the rest of the block by a GEMM.

Shapes: R rows, b columns of the block, G groups.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_compress.ops.gptq_block.operands import Block, Rounding

__all__ = ["gptq_block_"]


def gptq_block_(block: Block, rounding: Rounding | None, start: int, stop: int, sub_block: int) -> None:
    """Columns start to stop; arguments as for :func:`lightning_compress.ops.gptq_block.gptq_block_`."""
    A_bR, Q_bR, D_bR, W_bR, U_bb, keep_bR = block
    b = len(A_bR)
    a_rows, q_rows, w_rows, d_rows = A_bR.unbind(0), Q_bR.unbind(0), W_bR.unbind(0), D_bR.unbind(0)
    scales, zeros, groups = _rows(rounding)
    removed = None if keep_bR is None or rounding is None else (~keep_bR).unbind(0)
    for i1 in range(start // sub_block * sub_block, stop, sub_block):
        i2 = min(i1 + sub_block, b)
        j1, j2 = max(i1, start), min(i2, stop)
        # Factors from column k to all of the sub-block, zero up to k itself: adding zeros is quicker than slicing.
        factors = U_bb[i1:i2, i1:i2].triu(1).contiguous().unbind(0)
        A_sub = A_bR[i1:i2]
        for j in range(j1, j2):
            if rounding is not None:
                rounding.grid.nearest_(a_rows[j], scales[groups[j]], zeros[groups[j]], q_rows[j])
                if removed is not None:
                    q_rows[j].masked_fill_(removed[j], 0)
            elif keep_bR is not None:
                torch.mul(a_rows[j], keep_bR[j], out=q_rows[j])
            else:
                q_rows[j].copy_(a_rows[j])
            torch.sub(w_rows[j], q_rows[j], out=d_rows[j])
            A_sub.addr_(factors[j - i1], d_rows[j])
        if i2 < b:
            A_bR[i2:].addmm_(U_bb[j1:j2, i2:].t(), D_bR[j1:j2])


def _rows(rounding: Rounding | None) -> tuple[Sequence[Tensor], Sequence[Tensor | None], list[int]]:
    """Scales and zero points of each group, and the group of each column."""
    if rounding is None:
        return (), (), []
    zeros = [None] * len(rounding.scale_GR) if rounding.zero_GR is None else rounding.zero_GR.unbind(0)
    return rounding.scale_GR.unbind(0), zeros, rounding.group_b.tolist()
