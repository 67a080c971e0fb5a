"""The product of int4 weights with tokens in 8 bits, slow and obvious.

    y_mn = s_m sum_k q_mk (W_nk)        W_nk = code_nk * scale_n,group(k)        codes -8 to 7, symmetric grids

The codes q and scales s of tokens are those of w8a8_gemm.

Shapes: M tokens, N output features, K input features, G groups of K / G columns each (1: one scale per row).
"""

import torch
from torch import Tensor

from lightning_compress.ops.w4a16_gemm.reference import SYMMETRIC_ZERO, unpack

__all__ = ["dequantize", "gemm", "signed"]


def gemm(codes_MK: Tensor, scale_M: Tensor, weight: Tensor, scale_NG: Tensor) -> Tensor:
    """y [M, N] in float64; ``weight`` as for :func:`dequantize`."""
    W_NK = dequantize(weight, scale_NG, codes_MK.shape[1], torch.float64)
    return codes_MK.double() @ W_NK.t() * scale_M.double()[:, None]


def dequantize(weight: Tensor, scale_NG: Tensor, K: int, dtype: torch.dtype | None = None) -> Tensor:
    """W [N, K], computed in float32 (float64 if ``dtype`` is) and rounded to ``dtype``, by default the scale's.

    Args:
        weight: Codes, int32 [N, ceil(K / 8)] (pack-quantized), or int8 [N, K] (int-quantized).
        scale_NG: Scales, any floating dtype.
        K: Number of columns.
        dtype: Dtype of the result.
    """
    dtype = dtype or scale_NG.dtype
    wide = torch.promote_types(dtype, torch.float32)
    N, G = scale_NG.shape
    return (signed(weight, K).to(wide).view(N, G, K // G) * scale_NG.to(wide).unsqueeze(-1)).view(N, K).to(dtype)


def signed(weight: Tensor, K: int) -> Tensor:
    """Codes -8 to 7, int8 [N, K]."""
    return weight if weight.dtype == torch.int8 else unpack(weight, K) - SYMMETRIC_ZERO
