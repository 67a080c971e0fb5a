"""The block by torch, on any device: two levels, on W^T, whose columns lie contiguous.

Within a sub-block of 16 columns errors are handed on one by one, to the rest of the block by a GEMM.

Shapes: R rows, b columns of the block, G groups.
"""

import torch
from torch import Tensor

from lightning_compress.ops.gptq_block.grid import Grid

__all__ = ["gptq_block_"]


def gptq_block_(
    A_bR: Tensor,
    Q_bR: Tensor,
    D_bR: Tensor,
    W_bR: Tensor,
    U_bb: Tensor,
    grid: Grid | None,
    scale_GR: Tensor | None,
    zero_GR: Tensor | None,
    group_b: Tensor | None,
    keep_bR: Tensor | None,
    start: int,
    stop: int,
    sub_block: int,
) -> None:
    """Columns start to stop; arguments as for :func:`lightning_compress.ops.gptq_block.gptq_block_`."""
    b = len(A_bR)
    scales = None if scale_GR is None else scale_GR.unbind(0)
    zeros = None if zero_GR is None else zero_GR.unbind(0)
    groups = None if group_b is None else group_b.tolist()
    gone = None if keep_bR is None or grid is None else (~keep_bR).unbind(0)
    a_rows, q_rows, w_rows, d_rows = A_bR.unbind(0), Q_bR.unbind(0), W_bR.unbind(0), D_bR.unbind(0)
    for i1 in range(start // sub_block * sub_block, stop, sub_block):
        i2 = min(i1 + sub_block, b)
        j1, j2 = max(i1, start), min(i2, stop)
        # From column k to all of the sub-block, zero up to k itself: to add zeros there is quicker than to slice.
        hand_on = U_bb[i1:i2, i1:i2].triu(1).contiguous().unbind(0)
        A_sub = A_bR[i1:i2]
        for j in range(j1, j2):
            if grid is not None:
                assert scales is not None
                assert groups is not None
                group = groups[j]
                grid.nearest_(a_rows[j], scales[group], None if zeros is None else zeros[group], q_rows[j])
                if gone is not None:
                    q_rows[j].masked_fill_(gone[j], 0)
            elif keep_bR is not None:
                torch.mul(a_rows[j], keep_bR[j], out=q_rows[j])
            else:
                q_rows[j].copy_(a_rows[j])
            torch.sub(w_rows[j], q_rows[j], out=d_rows[j])
            A_sub.addr_(hand_on[j - i1], d_rows[j])
        if i2 < b:
            A_bR[i2:].addmm_(U_bb[j1:j2, i2:].t(), D_bR[j1:j2])
