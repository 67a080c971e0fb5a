"""H += X^T X, computed in the lower triangle only: the Hessian of a layer, from its inputs.

Shapes: N tokens, C columns (input features). Layout, cost and measured times are in the README beside this file.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_compress.ops.availability import KERNEL_DTYPES, calls_kernel, kernel_runs
from lightning_compress.ops.registration import register_op

__all__ = ["hessian_accumulate_", "mirror_"]

LEAF = 96  # columns of a tile on the diagonal: 48 to 144 run equally (AMD EPYC, one thread), 192 slower
GPU_LEAF = 4096


def hessian_accumulate_(H_CC: Tensor, X_NC: Tensor) -> Tensor:
    """Add X^T X to the lower triangle of H, in place; values above the diagonal are undefined until :func:`mirror_`.

    Args:
        H_CC: float32 or float64, [C, C], contiguous.
        X_NC: [N, C], any floating dtype. X^T X of a call is summed in float32 (of float64 X in float64) and added in
            the dtype of H: with float64 the order of calls leaves no trace in what is rounded to float32 afterwards.
            On CUDA the tensor cores add them: products of bf16 and fp16 are exact, those of float32 three of bf16.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit.
    """
    if H_CC.ndim != 2 or H_CC.shape[0] != H_CC.shape[1] or X_NC.ndim != 2 or X_NC.shape[1] != H_CC.shape[1]:
        raise ValueError(f"expected H [C, C] and X [N, C], got {tuple(H_CC.shape)} and {tuple(X_NC.shape)}")
    if H_CC.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"H must be float32 or float64, got {H_CC.dtype}: lower ones lose positive definiteness")
    if not H_CC.is_contiguous():
        raise ValueError("H must be contiguous: it is written in place; make it with torch.zeros(C, C)")
    if H_CC.device != X_NC.device:
        raise ValueError(f"H is on {H_CC.device} and X on {X_NC.device}; put them on one device")
    traced = torch.compiler.is_compiling() or (H_CC.is_cuda and not calls_kernel(H_CC))
    (_accumulate_op if traced else _accumulate_)(H_CC, X_NC)
    return H_CC


def mirror_(H_CC: Tensor) -> Tensor:
    """Copy the lower triangle of H onto the upper one, in place."""
    for rows, columns in tiles(0, len(H_CC)):
        if rows != columns:
            H_CC[columns, rows].copy_(H_CC[rows, columns].t())
        else:  # tiles of the kernel have other limits
            H_CC[rows, rows].copy_(H_CC[rows, rows].tril() + H_CC[rows, rows].tril(-1).t())
    return H_CC


def _accumulate_(H_CC: Tensor, X_NC: Tensor) -> None:
    if H_CC.is_cuda and X_NC.dtype in KERNEL_DTYPES and _kernel_runs(H_CC.device):
        from lightning_compress.ops.hessian.kernel import accumulate_

        accumulate_(H_CC, X_NC)
        return
    X_NC = X_NC.to(torch.promote_types(X_NC.dtype, torch.float32))
    leaf = LEAF if H_CC.device.type == "cpu" else GPU_LEAF  # one large GEMM fills a GPU better than many small ones
    for rows, columns in tiles(0, len(H_CC), leaf):
        if H_CC.dtype == X_NC.dtype:
            H_CC[rows, columns].addmm_(X_NC[:, rows].t(), X_NC[:, columns])
        else:
            H_CC[rows, columns] += X_NC[:, rows].t() @ X_NC[:, columns]


def _kernel_runs(device: torch.device) -> bool:
    return kernel_runs(device, "X^T X is computed in both triangles, in float32")


def tiles(low: int, high: int, leaf: int = LEAF) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of tiles that cover the lower triangle of [low:high, low:high]: its halves, the square between.

    The squares are as large as possible, so that nearly all of the work runs at the speed of a large GEMM.
    """
    if high - low <= leaf:
        yield slice(low, high), slice(low, high)
        return
    middle = low + -(-(high - low) // 64) * 32  # a multiple of 32 columns: tiles begin on cache lines
    yield from tiles(low, middle, leaf)
    yield from tiles(middle, high, leaf)
    yield slice(middle, high), slice(low, middle)


_accumulate_op = register_op(
    "hessian_accumulate_", "(Tensor(a0!) H, Tensor X) -> ()", _accumulate_, lambda H, X: None, mutates=("H",)
)
