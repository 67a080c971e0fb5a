"""Reference of the ops, slow and obvious.

    s_m = max_k |x_mk| / h        q_mk = nearest code to clamp(x_mk / s_m)        one scale per token, or a fixed one
    y_mn = s_m s_n sum_k q_mk w_nk

h is half of the range of codes: 127.5 for int8 (-128 to 127), 448 for e4m3. Scale and quotient are rounded to the dtype
of x, and a scale of 0 becomes the epsilon of that dtype, as in compressed-tensors' fake-quantize, so that a reloaded
checkpoint computes with the same codes.

Shapes: M tokens, N output features, K input features.
"""

import torch
from torch import Tensor

__all__ = ["HALF_RANGE", "gemm", "quantize", "quantize_tokens"]

HALF_RANGE = {torch.int8: 127.5, torch.float8_e4m3fn: 448.0}
LOWEST_AND_LARGEST = {torch.int8: (-128.0, 127.0), torch.float8_e4m3fn: (-448.0, 448.0)}


def quantize_tokens(x_MK: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [M, K] of ``kind`` (int8 or float8_e4m3fn) and their scales, float32 [M]."""
    half = torch.full(
        (), HALF_RANGE[kind], dtype=x_MK.dtype, device=x_MK.device
    )  # CUDA multiplies by the inverse of a number
    scale_M = x_MK.abs().amax(1) / half
    scale_M = torch.where(scale_M == 0, torch.finfo(x_MK.dtype).eps, scale_M)
    return quantize(x_MK, scale_M[:, None], kind), scale_M.float()


def quantize(x: Tensor, scale: Tensor, kind: torch.dtype) -> Tensor:
    """Codes of ``kind`` for a scale that broadcasts against x; the quotient has the promoted dtype of both."""
    v = (x / scale).clamp(*LOWEST_AND_LARGEST[kind])
    return v.round().to(kind) if kind == torch.int8 else v.to(kind)


def gemm(codes_MK: Tensor, scale_M: Tensor, weight_NK: Tensor, scale_N: Tensor) -> Tensor:
    """y [M, N] in float64; either scale may be one number, [1]."""
    return (codes_MK.double() @ weight_NK.double().t()) * scale_M.double()[:, None] * scale_N.double()
