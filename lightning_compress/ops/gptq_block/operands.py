"""What the op works on: the matrices of a block of columns, and what they are rounded to.

Shapes: R rows (output features), b columns of the block, G groups of columns that share a scale. All matrices are
transposed, [b, R]: a column of the weight is contiguous.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_compress.ops.gptq_block.grid import Grid

__all__ = ["Block", "Rounding", "check"]


class Block(NamedTuple):
    """The matrices of a block, float32 or float64, all contiguous but for U.

    Args:
        A_bR: The columns with the errors of all columns before the block added. The op leaves in it the rounded columns
            as they were just before rounding, and the later columns of the block with all errors so far added.
        Q_bR: Output, the rounded columns.
        D_bR: Output, W - Q, for the GEMM that adds the errors to later blocks.
        W_bR: The columns of the original weight.
        U_bb: Upper triangle: row k holds the factors by which the error of column k is added to the later columns
            (layerwise/factor.py). Any strides; the rest is not read.
        keep_bR: Bool, False where the result is zero; None if no result is set to zero.
    """

    A_bR: Tensor
    Q_bR: Tensor
    D_bR: Tensor
    W_bR: Tensor
    U_bb: Tensor
    keep_bR: Tensor | None = None

    def columns(self, start: int, stop: int) -> "Block":
        """The block of the columns from start to stop."""
        A, Q, D, W, keep = (None if m is None else m[start:stop] for m in (*self[:4], self.keep_bR))
        return Block(A, Q, D, W, self.U_bb[start:stop, start:stop], keep)  # type: ignore[arg-type]


class Rounding(NamedTuple):
    """The grid of a block and its scales.

    Args:
        grid: Rounds a column.
        scale_GR: Positive scales, in the dtype of A.
        zero_GR: Zero points, integers in the dtype of A; None for a symmetric grid.
        group_b: Row of ``scale_GR`` for each column, int32 or int64.
    """

    grid: Grid
    scale_GR: Tensor
    zero_GR: Tensor | None
    group_b: Tensor

    def columns(self, start: int, stop: int) -> "Rounding":
        """The rounding of the columns from start to stop."""
        return self._replace(group_b=self.group_b[start:stop])


def check(block: Block, rounding: Rounding | None, start: int, stop: int, sub_block: int) -> None:
    """ValueError where the arguments of the op do not fit."""
    _check_matrices(block, rounding)
    if rounding is not None:
        _check_groups(block, rounding)
    _check_mask_and_memory(block, rounding)
    b = len(block.A_bR)
    if not 0 <= start <= stop <= b or sub_block < 1:
        raise ValueError(
            f"expected columns 0 <= start <= stop <= {b} and a sub_block of at least 1, got {(start, stop)} and "
            f"{sub_block}"
        )


def _check_matrices(block: Block, rounding: Rounding | None) -> None:
    A_bR, U_bb, matrices = block.A_bR, block.U_bb, block[:4]
    if A_bR.ndim != 2 or any(m.shape != A_bR.shape for m in matrices) or U_bb.shape != (len(A_bR),) * 2:
        raise ValueError(
            f"expected A, Q, D and W [b, R] and U [b, b], got {', '.join(str(tuple(m.shape)) for m in matrices)} and "
            f"{tuple(U_bb.shape)}"
        )
    dtypes = [t.dtype for t in (*block[:5], *(() if rounding is None else rounding[1:3])) if t is not None]
    if A_bR.dtype not in (torch.float32, torch.float64) or any(dtype != A_bR.dtype for dtype in dtypes):
        raise ValueError(
            f"expected A, Q, D, W, U, scale and zero point all in float32 or all in float64, got "
            f"{', '.join(map(str, dtypes))}; 16 bits are too few for sums of errors, convert with .float()"
        )


def _check_groups(block: Block, rounding: Rounding) -> None:
    (b, R), scale_GR, zero_GR, group_b = block.A_bR.shape, *rounding[1:]
    G = len(scale_GR) if scale_GR.ndim else 0
    if scale_GR.shape != (G, R) or (zero_GR is not None and zero_GR.shape != (G, R)) or group_b.shape != (b,):
        zero_points = "" if zero_GR is None else f", zero point {tuple(zero_GR.shape)}"
        raise ValueError(
            f"expected a scale (and zero point) [G, {R}] and the group of each of {b} columns, got "
            f"{tuple(scale_GR.shape)}{zero_points} and {tuple(group_b.shape)}"
        )
    if group_b.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"the group of each column must be int32 or int64, got {group_b.dtype}")


def _check_mask_and_memory(block: Block, rounding: Rounding | None) -> None:
    A_bR, keep_bR = block.A_bR, block.keep_bR
    if keep_bR is not None and (keep_bR.shape != A_bR.shape or keep_bR.dtype != torch.bool):
        raise ValueError(f"expected a bool mask {tuple(A_bR.shape)}, got {keep_bR.dtype} {tuple(keep_bR.shape)}")
    grids = () if rounding is None else rounding[1:]
    if not all(t.is_contiguous() for t in (*block[:4], *grids[:2], keep_bR) if t is not None):
        raise ValueError(
            "A, Q, D, W, scale, zero point and mask must be contiguous: columns of the weight are rows here; take "
            "W.t().contiguous() once for all blocks, and slices of it"
        )
    devices = {str(t.device) for t in (*block, *grids) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {', '.join(sorted(devices))}")
