"""One block of GPTQ's columns for all rows: round a column, add its error to the later columns, and so on.

On CUDA a kernel in CUDA C++ runs, compiled by NVRTC at first use, or Triton's kernel where NVRTC is missing; elsewhere
a loop in torch on two levels. Without a grid, and with a mask, it is the update of SparseGPT. README beside this file.

Shapes: R rows (output features), b columns of the block, G groups of columns that share a scale. All matrices are
transposed, [b, R]: a column of the weight is contiguous.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_compress.ops.availability import calls_kernel, kernel_runs
from lightning_compress.ops.gptq_block import cpu
from lightning_compress.ops.gptq_block.grid import Grid
from lightning_compress.ops.gptq_block.operands import Block, Rounding, check
from lightning_compress.ops.registration import register_op

__all__ = ["SUB_BLOCK", "Block", "Grid", "Rounding", "gptq_block_"]

SUB_BLOCK = 16
LARGEST = 128  # columns that a kernel rounds at once; its shared memory


def gptq_block_(
    block: Block, rounding: Rounding | None = None, columns: tuple[int, int] | None = None, sub_block: int = SUB_BLOCK
) -> None:
    """Round columns one after the other, each with the errors of the earlier ones added; writes A, Q and D.

    Args:
        block: The matrices.
        rounding: Grid and scales; None: values are not rounded.
        columns: The first column and the one after the last; by default all of the block.
        sub_block: Number of columns within which torch adds errors one column at a time; kernels do so everywhere.

    Raises:
        ValueError: Dtypes, devices or shapes do not fit.
    """
    start, stop = (0, len(block.A_bR)) if columns is None else columns
    check(block, rounding, start, stop, sub_block)
    if torch.compiler.is_compiling() or (block.A_bR.is_cuda and not calls_kernel(block.A_bR)):
        grid, *scales = (Grid(0.0, 0.0), None, None, None) if rounding is None else rounding
        levels = (grid.low, grid.high, grid.float_bits, grid.stored, grid.through_bf16)  # torch 2.10 traces no astuple
        _block_op(*block[:5], *scales, block.keep_bR, *levels, start, stop, sub_block)
    else:
        _block_(block, rounding, start, stop, sub_block)


def _block_(block: Block, rounding: Rounding | None, start: int, stop: int, sub_block: int) -> None:
    A_bR, D_bR, U_bb = block.A_bR, block.D_bR, block.U_bb
    run_ = _kernel(block, rounding) if A_bR.is_cuda and A_bR.numel() else None
    if run_ is None:
        cpu.gptq_block_(block, rounding, start, stop, sub_block)
        return
    for i1 in range(start, stop, LARGEST):
        i2 = min(i1 + LARGEST, stop)
        run_(block.columns(i1, i2), None if rounding is None else rounding.columns(i1, i2))
        if i2 < len(A_bR):
            A_bR[i2:].addmm_(U_bb[i1:i2, i2:].t(), D_bR[i1:i2])


def _kernel(block: Block, rounding: Rounding | None) -> Callable[[Block, Rounding | None], None] | None:
    """The kernel that runs on this device: CUDA's, Triton's, or None; a warning says why it is not the first."""
    from lightning_compress.ops.gptq_block import cuda

    A_bR, grid, zero_GR = block.A_bR, None, None
    if rounding is not None:
        grid, zero_GR = rounding.grid, rounding.zero_GR
    unfit = None if A_bR.dtype == torch.float32 else f"the kernel needs float32, got {A_bR.dtype}"
    missing = unfit or cuda.missing(A_bR.device, grid, zero_GR is not None, block.keep_bR is not None)
    if missing is None:
        return cuda.gptq_block_
    if not kernel_runs(A_bR.device, "GPTQ's columns are rounded one by one", unfit):
        return None
    from lightning_compress.ops.gptq_block import kernel

    warnings.warn(f"GPTQ's blocks are rounded by Triton's kernel, not by the one in CUDA C++: {missing}", stacklevel=4)
    return kernel.gptq_block_


def _block_by_tensors(A: Tensor, Q: Tensor, D: Tensor, W: Tensor, U: Tensor, *others: Any) -> None:
    scale, zero, group, keep, low, high, float_bits, stored, through_bf16, start, stop, sub_block = others
    grid = Grid(low, high, float_bits, stored, through_bf16)
    rounding = None if scale is None else Rounding(grid, scale, zero, group)
    _block_(Block(A, Q, D, W, U, keep), rounding, start, stop, sub_block)


_block_op = register_op(
    "gptq_block_",
    "(Tensor(a0!) A, Tensor(a1!) Q, Tensor(a2!) D, Tensor W, Tensor U, Tensor? scale, Tensor? zero, Tensor? group, "
    "Tensor? keep, float low, float high, SymInt float_bits, ScalarType stored, bool through_bf16, SymInt start, "
    "SymInt stop, SymInt sub_block) -> ()",
    _block_by_tensors,
    lambda *_: None,
    mutates=("A", "Q", "D"),
)
