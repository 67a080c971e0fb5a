"""Reference of the op, slow and obvious. For each column j of the block, from left to right:

    q_j = the grid point nearest to a_j, or a_j itself without a grid; 0 where the mask is False
    d_j = w_j - q_j
    a_k = a_k + d_j U_jk                 for all k > j

Shapes: R rows, b columns of the block, G groups of columns that share a scale. Matrices are transposed, [b, R].
"""

from itertools import product

import torch
from torch import Tensor

from lightning_compress.ops.gptq_block.grid import Grid
from lightning_compress.ops.gptq_block.operands import Rounding

__all__ = ["gptq_block", "nearest"]

FORMATS = {4: (1, 0, 6.0), 6: (3, 0, 7.5), 8: (3, -6, 448.0)}  # mantissa bits, least exponent, largest


def gptq_block(
    A_bR: Tensor, W_bR: Tensor, U_bb: Tensor, rounding: Rounding | None = None, keep_bR: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """A (each column as it was just before rounding), Q and D, each [b, R], in float64."""
    A_bR, W_bR, U_bb = A_bR.double().clone(), W_bR.double(), U_bb.double()
    Q_bR, D_bR = torch.empty_like(A_bR), torch.empty_like(A_bR)
    b, R = A_bR.shape
    for j in range(b):
        q_R = A_bR[j]
        if rounding is not None:
            grid, scale_GR, zero_GR, group_b = rounding
            group = int(group_b[j])
            zero_R = torch.zeros(R, dtype=torch.float64, device="cpu") if zero_GR is None else zero_GR[group].double()
            q_R = nearest(q_R, scale_GR[group].double(), zero_R.to(q_R.device), grid)
        if keep_bR is not None:
            q_R = torch.where(keep_bR[j], q_R, 0.0)
        Q_bR[j], D_bR[j] = q_R, W_bR[j] - q_R
        for k in range(j + 1, b):
            A_bR[k] += D_bR[j] * U_bb[j, k]
    return A_bR, Q_bR, D_bR


def nearest(a_R: Tensor, s_R: Tensor, z_R: Tensor, grid: Grid) -> Tensor:
    """The nearest of all numbers of the format, times s, rounded to the dtype that stores it; float64."""
    v_R = a_R / s_R
    if grid.float_bits:
        numbers = _numbers(grid.float_bits).to(a_R.device)
        distance = (v_R[:, None] - numbers).abs()
        closest = distance == distance.amin(1, keepdim=True)  # two numbers at a midpoint
        even = torch.arange(len(numbers), device=a_R.device) % 2 == 0
        q_R = numbers[(closest.int() * 2 + (closest & even).int()).argmax(1)]
    else:
        q_R = (v_R + z_R).round().clamp(grid.low, grid.high) - z_R
    q_R = q_R * s_R
    return (q_R.float().to(torch.bfloat16) if grid.through_bf16 else q_R).to(grid.stored).double()


def _numbers(bits: int) -> Tensor:
    """Every number of the format in ascending order; numbers with an even code have an even index."""
    mantissa, least, largest = FORMATS[bits]
    positive = {0.0}
    for exponent, m in product(range(least, 9), range(2**mantissa)):
        positive |= {(1 + m / 2**mantissa) * 2.0**exponent, m / 2**mantissa * 2.0**least}
    up = sorted(x for x in positive if x <= largest)
    down = [-x for x in reversed(up[1:])]
    return torch.tensor(([] if len(down) % 2 == 0 else [-torch.inf]) + down + up, dtype=torch.float64, device="cpu")
