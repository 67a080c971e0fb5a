"""int4 weights of a compressed-tensors checkpoint, dequantized, and the product with them, slow and obvious.

    W_nk = (code_nk - zero_n,group(k)) * scale_n,group(k)          y = x W^T

Codes and zero points are stored as numbers 0 to 15 (8 is added to signed numbers), eight in a 32-bit word, the first in
the lowest bits: codes along k, zero points along n. Without zero points, 8 stands for 0.

Shapes: M tokens, N output features, K input features, G groups of K / G columns each (1: one scale per row).
"""

import torch
from torch import Tensor

__all__ = ["CODES_PER_WORD", "dequantize", "gemm", "pack", "unpack", "unpack_zero"]

CODES_PER_WORD = 8
SYMMETRIC_ZERO = 8


def gemm(x: Tensor, weight_packed: Tensor, scale_NG: Tensor, zero_packed: Tensor | None = None) -> Tensor:
    """The product x W^T in float64, [..., N].

    Args:
        x: Tokens, [..., K], any floating dtype.
        weight_packed: Codes, int32 [N, ceil(K / 8)].
        scale_NG: Scales, any floating dtype.
        zero_packed: Zero points, int32 [ceil(N / 8), G]; None for a symmetric grid.
    """
    return x.double() @ dequantize(weight_packed, scale_NG, zero_packed, x.shape[-1], torch.float64).t()


def dequantize(
    weight_packed: Tensor, scale_NG: Tensor, zero_packed: Tensor | None, K: int, dtype: torch.dtype | None = None
) -> Tensor:
    """W [N, K], computed in float32 (float64 if ``dtype`` is) and rounded to ``dtype``, by default the scale's."""
    dtype = dtype or scale_NG.dtype
    wide = torch.promote_types(dtype, torch.float32)
    N, G = scale_NG.shape
    codes_NGg = unpack(weight_packed, K).view(N, G, K // G)
    zero_NG = SYMMETRIC_ZERO if zero_packed is None else unpack_zero(zero_packed, N).unsqueeze(-1)
    return (codes_NGg - zero_NG).to(wide).mul_(scale_NG.to(wide).unsqueeze(-1)).view(N, K).to(dtype)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """Numbers 0 to 15 as int8 [rows, columns], from int32 [rows, ceil(columns / 8)]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 15).to(torch.int8).flatten(1)[:, :columns]


def unpack_zero(zero_packed: Tensor, N: int) -> Tensor:
    """Zero points 0 to 15 as int8 [N, G]."""
    return unpack(zero_packed.t(), N).t()


def pack(codes: Tensor) -> Tensor:
    """The reverse of :func:`unpack`, int32; unused bits of the last word of a row are 0."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % CODES_PER_WORD)).long()
    shifts = torch.arange(0, 32, 4, device=codes.device)
    words = padded.unflatten(1, (-1, CODES_PER_WORD)) << shifts
    return words.sum(-1).to(torch.int32)  # wraps above 2^31, as intended
