"""The best weights on a fixed support: the remaining weights minimize the error of the layer.

    q_S = (W H)_S (H_SS)^-1                 per row, S its kept columns: the least (w - q) H (w - q)^T

Conjugate gradients with Jacobi preconditioning find it for all rows at once, one GEMM per iteration, and can stop at
any time: the loss falls with every iteration. In a sweep over columns (SparseGPT) only later columns correct earlier
ones; ten iterations after it come within a per cent of the exact solution.

Shapes: R rows (output features), C columns (inputs).
"""

import torch
from torch import Tensor

__all__ = ["refit"]


def refit(W_RC: Tensor, Q_RC: Tensor, keep_RC: Tensor, H_CC: Tensor, iterations: int) -> Tensor:
    """Improve Q where ``keep_RC`` is True.

    Args:
        W_RC: Dense weights, float32 or float64.
        Q_RC: Initial weights, zero outside of the support.
        keep_RC: The support, bool.
        H_CC: Positive definite (damped), both triangles, in the dtype of W.
        iterations: Iterations of conjugate gradients, for every row.

    Returns:
        Q [R, C], exactly zero outside of the support.
    """
    Q_RC = Q_RC.clone()
    if iterations == 0:
        return Q_RC
    inverse_C = H_CC.diagonal().reciprocal()
    residual_RC = ((W_RC - Q_RC) @ H_CC).mul_(keep_RC)  # minus half the gradient
    step_RC = residual_RC * inverse_C
    direction_RC = step_RC.clone()
    size_R = (residual_RC * step_RC).sum(1, keepdim=True)
    for left in reversed(range(iterations)):
        moved_RC = (direction_RC @ H_CC).mul_(keep_RC)
        length_R = _ratio(size_R, (direction_RC * moved_RC).sum(1, keepdim=True))
        Q_RC.addcmul_(direction_RC, length_R)
        if not left:
            break
        residual_RC.addcmul_(moved_RC, length_R, value=-1)
        torch.mul(residual_RC, inverse_C, out=step_RC)
        before_R, size_R = size_R, (residual_RC * step_RC).sum(1, keepdim=True)
        direction_RC.mul_(_ratio(size_R, before_R)).add_(step_RC)
    return Q_RC


def _ratio(a_R: Tensor, b_R: Tensor) -> Tensor:
    """The quotient a / b, and 0 in converged rows: b is 0, or so small that the division overflows."""
    return (a_R / b_R).nan_to_num_(0.0, 0.0, 0.0)
