"""One block of GPTQ's columns for all rows: round a column, hand its error on to the columns that come after it.

On CUDA a kernel in CUDA C++, compiled by NVRTC at first use, or Triton's where there is no NVRTC; elsewhere a loop of
torch's in two levels. Without a grid, and with a mask, it is the update of SparseGPT. README beside this file.

Shapes: R rows (output features), b columns of the block, G groups of columns that share a scale. All matrices stand on
their side, [b, R]: a column of the weight lies contiguous.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_compress.ops.availability import calls_kernel, kernel_runs
from lightning_compress.ops.gptq_block import cpu
from lightning_compress.ops.gptq_block.grid import Grid

__all__ = ["SUB_BLOCK", "Grid", "gptq_block_"]

SUB_BLOCK = 16
LARGEST = 128  # columns of a kernel; its shared memory

Run = Callable[..., None]


def gptq_block_(
    A_bR: Tensor,
    Q_bR: Tensor,
    D_bR: Tensor,
    W_bR: Tensor,
    U_bb: Tensor,
    grid: Grid | None = None,
    scale_GR: Tensor | None = None,
    zero_GR: Tensor | None = None,
    group_b: Tensor | None = None,
    keep_bR: Tensor | None = None,
    columns: tuple[int, int] | None = None,
    sub_block: int = SUB_BLOCK,
) -> None:
    """Round columns, one after the other, each after the errors of those before it; writes A, Q and D.

    Args:
        A_bR: The columns with the errors of all columns before the block; afterwards those that were rounded as they
            were just before, and the later ones of the block with all errors so far. float32 or float64, contiguous.
        Q_bR: Receives what they became.
        D_bR: Receives W - Q, for the GEMM that hands errors on to later blocks.
        W_bR: The columns as they were at the very first.
        U_bb: Upper triangle: row k is what later columns take over from the error of column k; any
            strides, the rest is not read.
        grid: What is rounded to; None: values stay as they are.
        scale_GR: With a grid: positive, in the dtype of A.
        zero_GR: The same, integers; None for a symmetric grid.
        group_b: With a grid: row of ``scale_GR`` for each column, integers.
        keep_bR: Bool, False where the result is zero; None: nowhere.
        columns: The first one and the one after the last; by default the whole block.
        sub_block: Columns within which torch hands errors on one by one; kernels do so everywhere.

    Raises:
        ValueError: Dtypes, devices or shapes do not fit.
    """
    start, stop = (0, len(A_bR)) if columns is None else columns
    _check(A_bR, Q_bR, D_bR, W_bR, U_bb, grid, scale_GR, zero_GR, group_b, keep_bR, start, stop, sub_block)
    tensors = (A_bR, Q_bR, D_bR, W_bR, U_bb, scale_GR, zero_GR, group_b, keep_bR)
    if torch.compiler.is_compiling() or (A_bR.is_cuda and not calls_kernel(A_bR)):
        g = Grid(0.0, 0.0) if grid is None else grid
        _block_op(*tensors, g.low, g.high, g.float_bits, g.stored, g.through_bf16, start, stop, sub_block)
    else:
        _block_(*tensors, grid, start, stop, sub_block)


def _check(
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
    matrices = (A_bR, Q_bR, D_bR, W_bR)
    if A_bR.ndim != 2 or any(m.shape != A_bR.shape for m in matrices) or U_bb.shape != (len(A_bR),) * 2:
        raise ValueError(
            f"expected A, Q, D and W [b, R] and U [b, b], got {', '.join(str(tuple(m.shape)) for m in matrices)} and "
            f"{tuple(U_bb.shape)}"
        )
    b, R = A_bR.shape
    values = [t for t in (*matrices, U_bb, scale_GR, zero_GR) if t is not None]
    if A_bR.dtype not in (torch.float32, torch.float64) or any(t.dtype != A_bR.dtype for t in values):
        raise ValueError(
            f"expected A, Q, D, W, U, scale and zero point all in float32 or all in float64, got "
            f"{', '.join(str(t.dtype) for t in values)}; 16 bits do not hold what is handed on, convert with .float()"
        )
    if (grid is None) != (scale_GR is None) or (grid is None) != (group_b is None):
        raise ValueError("a grid needs a scale and the group of each column, and these need a grid; pass all or none")
    if scale_GR is not None and group_b is not None:
        G = len(scale_GR) if scale_GR.ndim else 0
        if scale_GR.shape != (G, R) or (zero_GR is not None and zero_GR.shape != (G, R)) or group_b.shape != (b,):
            came = "" if zero_GR is None else f", zero point {tuple(zero_GR.shape)}"
            raise ValueError(
                f"expected a scale (and zero point) [G, {R}] and the group of each of {b} columns, got "
                f"{tuple(scale_GR.shape)}{came} and {tuple(group_b.shape)}"
            )
        if group_b.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"the group of each column must be int32 or int64, got {group_b.dtype}")
    if keep_bR is not None and (keep_bR.shape != A_bR.shape or keep_bR.dtype != torch.bool):
        raise ValueError(f"expected a bool mask {tuple(A_bR.shape)}, got {keep_bR.dtype} {tuple(keep_bR.shape)}")
    laid_out = [t for t in (*matrices, scale_GR, zero_GR, keep_bR) if t is not None]
    if not all(t.is_contiguous() for t in laid_out):
        raise ValueError(
            "A, Q, D, W, scale, zero point and mask must be contiguous: columns of the weight are rows here; take "
            "W.t().contiguous() once for all blocks, and slices of it"
        )
    devices = {t.device for t in (*laid_out, U_bb, *([] if group_b is None else [group_b]))}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")
    if not 0 <= start <= stop <= b or sub_block < 1:
        raise ValueError(
            f"expected columns 0 <= start <= stop <= {b} and a sub_block of at least 1, got {(start, stop)} and "
            f"{sub_block}"
        )


def _block_(
    A_bR: Tensor,
    Q_bR: Tensor,
    D_bR: Tensor,
    W_bR: Tensor,
    U_bb: Tensor,
    scale_GR: Tensor | None,
    zero_GR: Tensor | None,
    group_b: Tensor | None,
    keep_bR: Tensor | None,
    grid: Grid | None,
    start: int,
    stop: int,
    sub_block: int,
) -> None:
    run_ = _kernel(A_bR, grid, zero_GR, keep_bR) if A_bR.is_cuda and A_bR.numel() else None
    if run_ is None:
        cpu.gptq_block_(A_bR, Q_bR, D_bR, W_bR, U_bb, grid, scale_GR, zero_GR, group_b, keep_bR, start, stop, sub_block)
        return
    for i1 in range(start, stop, LARGEST):
        i2 = min(i1 + LARGEST, stop)
        group, keep = (None if t is None else t[i1:i2] for t in (group_b, keep_bR))
        some = (m[i1:i2] for m in (A_bR, Q_bR, D_bR, W_bR))
        run_(*some, U_bb[i1:i2, i1:i2], grid, scale_GR, zero_GR, group, keep)
        if i2 < len(A_bR):
            A_bR[i2:].addmm_(U_bb[i1:i2, i2:].t(), D_bR[i1:i2])


def _kernel(A_bR: Tensor, grid: Grid | None, zero_GR: Tensor | None, keep_bR: Tensor | None) -> Run | None:
    """The kernel that this device runs: CUDA's, Triton's, or none; a warning says why it is not the first."""
    from lightning_compress.ops.gptq_block import cuda

    unfit = None if A_bR.dtype == torch.float32 else f"it takes float32, not {A_bR.dtype}"
    missing = unfit or cuda.missing(A_bR.device, grid, zero_GR is not None, keep_bR is not None)
    if missing is None:
        return cuda.gptq_block_
    if not kernel_runs(A_bR.device, "GPTQ's columns are rounded one by one", unfit):
        return None
    from lightning_compress.ops.gptq_block import kernel

    warnings.warn(f"GPTQ's blocks are rounded by Triton's kernel, not by the one in CUDA C++: {missing}", stacklevel=4)
    return kernel.gptq_block_


@torch.library.custom_op("lightning_compress::gptq_block_", mutates_args=("A", "Q", "D"))
def _block_op(
    A: Tensor,
    Q: Tensor,
    D: Tensor,
    W: Tensor,
    U: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    group: Tensor | None,
    keep: Tensor | None,
    low: float,
    high: float,
    float_bits: int,
    stored: torch.dtype,
    through_bf16: bool,
    start: int,
    stop: int,
    sub_block: int,
) -> None:
    grid = None if scale is None else Grid(low, high, float_bits, stored, through_bf16)
    _block_(A, Q, D, W, U, scale, zero, group, keep, grid, start, stop, sub_block)


@_block_op.register_fake
def _(
    A: Tensor,
    Q: Tensor,
    D: Tensor,
    W: Tensor,
    U: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    group: Tensor | None,
    keep: Tensor | None,
    low: float,
    high: float,
    float_bits: int,
    stored: torch.dtype,
    through_bf16: bool,
    start: int,
    stop: int,
    sub_block: int,
) -> None:
    return None
