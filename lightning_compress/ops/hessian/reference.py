"""Reference of the op, slow and obvious."""

from torch import Tensor

__all__ = ["hessian_accumulate_"]


def hessian_accumulate_(H_CC: Tensor, X_NC: Tensor) -> Tensor:
    """H += X^T X, both triangles. H [C, C] float32 or float64, X [N, C] of any floating dtype."""
    X_NC = X_NC.to(H_CC.dtype)
    return H_CC.addmm_(X_NC.t(), X_NC)
