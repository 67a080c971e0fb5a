"""FP4 weights of a compressed-tensors checkpoint, dequantized, and the product with them, slow and obvious.

    W_nk = code_nk * s_n,group(k) / g          y = x W^T

Codes are E2M1, sign above exponent above mantissa: 0 .5 1 1.5 2 3 4 6; two to a byte, the first in the low half. NVFP4
(groups of 16): s is e4m3, g one float32 number of the tensor. MXFP4 (groups of 32, OCP Microscaling v1.0): s is stored
as its exponent e, s = 2^(e - 127), and there is no g.

Shapes: M tokens, N output features, K input features, G groups of K / G columns each.
"""

import torch
from torch import Tensor

__all__ = ["VALUES", "dequantize", "gemm", "pack", "scales", "unpack"]

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def gemm(x: Tensor, weight_packed: Tensor, scale_NG: Tensor, global_scale: Tensor | None = None) -> Tensor:
    """The product x W^T in float64, [..., N], with weights that are not rounded.

    Args:
        x: Tokens, [..., K], any floating dtype.
        weight_packed: Codes, uint8 [N, K / 2].
        scale_NG: Scales, float8_e4m3fn, or uint8 exponents.
        global_scale: Scale of the tensor, float32 [1]; NVFP4 only.
    """
    return x.double() @ dequantize(weight_packed, scale_NG, global_scale, torch.float64).t()


def dequantize(
    weight_packed: Tensor, scale_NG: Tensor, global_scale: Tensor | None = None, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """W [N, K], computed in float32 (float64 if ``dtype`` is) and rounded to ``dtype``.

    compressed-tensors decompresses to bfloat16, whatever the model's dtype.
    """
    wide = torch.promote_types(dtype, torch.float32)
    N, G = scale_NG.shape
    values = torch.tensor(VALUES, dtype=wide, device=weight_packed.device)
    codes_NK = unpack(weight_packed).long()
    W_NGg = (values[codes_NK & 7] * (1 - 2 * (codes_NK >> 3))).view(N, G, -1)
    s_NG = scales(scale_NG, wide)
    if global_scale is not None:
        s_NG = s_NG / global_scale.to(wide)
    return (W_NGg * s_NG.unsqueeze(-1)).view(N, -1).to(dtype)


def scales(scale_NG: Tensor, dtype: torch.dtype) -> Tensor:
    """The stored scales (e4m3, or exponents of two) as numbers."""
    if scale_NG.dtype != torch.uint8:
        return scale_NG.to(dtype)
    return torch.ldexp(torch.ones_like(scale_NG, dtype=dtype), scale_NG.int() - 127)


def unpack(packed: Tensor) -> Tensor:
    """Codes 0 to 15, uint8 [N, K], of uint8 [N, K / 2]."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)


def pack(codes: Tensor) -> Tensor:
    """The reverse of :func:`unpack`."""
    return codes[:, ::2] | codes[:, 1::2] << 4
