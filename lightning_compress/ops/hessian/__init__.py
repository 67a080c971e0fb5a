"""H += X^T X, of which only the lower triangle is worked out: the second moment of a layer's inputs.

Shapes: N tokens, C columns (input features). Layout, cost and measured times are in the README beside this file.
"""

import torch
from torch import Tensor

from lightning_compress.ops.hessian import reference

__all__ = ["block_columns", "hessian_accumulate_", "mirror_"]


def hessian_accumulate_(H_CC: Tensor, X_NC: Tensor) -> Tensor:
    """Add X^T X to the lower triangle of H, in place; what is above it means nothing until :func:`mirror_`.

    Args:
        H_CC: float32 or float64, [C, C], contiguous.
        X_NC: [N, C], any floating dtype; it is raised to the dtype of H first, so that bf16 inputs add up in float32.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit.
    """
    if H_CC.ndim != 2 or H_CC.shape[0] != H_CC.shape[1] or X_NC.ndim != 2 or X_NC.shape[1] != H_CC.shape[1]:
        raise ValueError(f"expected H [C, C] and X [N, C], got {tuple(H_CC.shape)} and {tuple(X_NC.shape)}")
    if H_CC.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"H must be float32 or float64, got {H_CC.dtype}: lower ones lose positive definiteness")
    if H_CC.device != X_NC.device:
        raise ValueError(f"H is on {H_CC.device} and X on {X_NC.device}; put them on one device")
    X_NC = X_NC.to(H_CC.dtype)
    if H_CC.device.type != "cpu":
        return reference.hessian_accumulate_(H_CC, X_NC)      # one large GEMM fills a GPU better than many small
    C = X_NC.shape[1]
    step = block_columns(C)
    for low in range(0, C, step):
        high = min(low + step, C)
        H_CC[low:high, :high].addmm_(X_NC[:, low:high].t(), X_NC[:, :high])
    return H_CC


def mirror_(H_CC: Tensor) -> Tensor:
    """Copy the lower triangle of H onto the upper one, in place."""
    C = len(H_CC)
    step = block_columns(C)
    for low in range(0, C, step):                  # the blocks on the diagonal are whole already
        high = min(low + step, C)
        H_CC[:low, low:high].copy_(H_CC[low:high, :low].t())
    return H_CC


def block_columns(C: int) -> int:
    """Columns of one block row: eight block rows save 44 % of the work, and 96 columns run near full GEMM speed."""
    return max(96, -(-C // 8))
