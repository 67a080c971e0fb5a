"""The meaning of the ops, slow and obvious.

    s_m = max_k |x_mk| / 127.5        q_mk = clamp(round(x_mk / s_m), -128, 127)        one scale per token
    y_mn = s_m s_n sum_k q_mk w_nk

127.5 is half of the range from -128 to 127, as in compressed-tensors. A token of zeros has the scale 1.

Shapes: M tokens, N output features, K input features.
"""

import torch
from torch import Tensor

__all__ = ["HALF_RANGE", "gemm", "quantize_tokens"]

HALF_RANGE = 127.5


def quantize_tokens(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [M, K] and scales float32 [M]."""
    largest_M = x_MK.float().abs().amax(1)
    scale_M = torch.where(largest_M == 0, 1.0, largest_M / HALF_RANGE)
    return (x_MK.float() / scale_M[:, None]).round().clamp(-128, 127).to(torch.int8), scale_M


def gemm(codes_MK: Tensor, scale_M: Tensor, weight_NK: Tensor, scale_N: Tensor) -> Tensor:
    """y [M, N] in float64."""
    return (codes_MK.double() @ weight_NK.double().t()) * scale_M.double()[:, None] * scale_N.double()
