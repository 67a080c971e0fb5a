"""The layout that the kernel reads: planes of FP4 bits and one byte of scale per group, made once from the checkpoint.

Words of 16 bits hold four codes, as in w4a16_gemm: columns are in blocks of 128 (the last is padded with zeros), and
element j (0 to 3) of word c (0 to 31) of block b is column 128 b + 32 j + c. The bits of element 0 have the positions
of the sign and the lowest bits of exponent and mantissa of a bf16 number, those of elements 1 and 2 are three and six
bits lower: one shift and one mask give bf16 numbers, 2^-126 times the code. The bits of element 3 fill the gaps.

    bit    15 14 13 12 11 10  9  8  7  6  5  4  3  2  1  0         s sign, e exponent, m mantissa of elements 0 to 3
           s0 s3 e3 s1 e3 m3 s2 e0 e0 m0 e1 e1 m1 e2 e2 m2

A scale is a byte without sign, five bits of exponent E above three of mantissa m, with the value (1 + m / 8) 2^(E - 31)
over the divisor of its row: every e4m3 number has such a byte (2^8 has E = 31), and so has every power of two down to
2^-30 of the largest of its row. Codes in groups with smaller scales, and with scale 0, become 0.

Shapes: N output features, K input features, G groups, P = 32 ceil(K / 128) words in a row.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.ops.fp4_gemm.reference import VALUES, pack, scales, unpack
from lightning_compress.ops.w4a16_gemm.layout import BLOCK, PLANE, PLANES

__all__ = ["Layout", "dense", "from_layout", "to_layout"]

TOP = 31  # exponent of the largest scale; E4M3's largest exponent is 8
E4M3_TOP = 8


class Layout(NamedTuple):
    """``planes`` int16 [N, P], ``scale`` uint8 [G, N], ``divisor`` float32 [N]."""

    planes: Tensor
    scale: Tensor
    divisor: Tensor


def to_layout(weight_packed: Tensor, scale_NG: Tensor, global_scale: Tensor | None = None) -> Layout:
    """The layout of the tensors of a checkpoint; rows of several layouts (q, k, v) may be concatenated.

    Args:
        weight_packed: Codes, uint8 [N, K / 2].
        scale_NG: Scales, float8_e4m3fn (NVFP4), or uint8 exponents (MXFP4).
        global_scale: Scale of the tensor, one float32 number; NVFP4 only.

    Raises:
        ValueError: Dtypes or shapes do not fit, or a scale is negative or NaN.
    """
    _check(weight_packed, scale_NG, global_scale)
    (N, G), K = scale_NG.shape, weight_packed.shape[1] * 2
    if scale_NG.dtype == torch.uint8:
        largest_N1 = scale_NG.int().amax(1, keepdim=True).clamp_(min=1)
        byte_NG = (scale_NG.int() - largest_N1 + TOP) << 3
        divisor_N = torch.ldexp(torch.ones(N, device=scale_NG.device, dtype=torch.float32), 128 - largest_N1[:, 0])
    else:
        fraction, exponent = torch.frexp(scale_NG.float())  # s = fraction 2^exponent, 1/2 <= fraction < 1
        byte_NG = (exponent - 1 + TOP - E4M3_TOP) << 3 | (fraction * 16).int() & 7
        byte_NG = torch.where(scale_NG.float() == 0, 0, byte_NG)
        one = torch.ones(1, device=scale_NG.device, dtype=torch.float32)
        one = one if global_scale is None else global_scale.reshape(1)
        divisor_N = (one * 2.0 ** (1 - E4M3_TOP)).expand(N).contiguous()
    zero_NG = byte_NG < 8
    codes_NK = unpack(weight_packed).int().masked_fill(zero_NG.repeat_interleave(K // G, 1), 0)
    scale_GN = byte_NG.masked_fill(zero_NG, 8).to(torch.uint8).t().contiguous()
    return Layout(_planes(codes_NK), scale_GN, divisor_N)


def from_layout(layout: Layout, K: int, exponents: bool) -> tuple[Tensor, Tensor]:
    """``weight_packed`` and ``weight_scale`` of :func:`to_layout`, but for codes in groups whose scale has no byte.

    ``exponents``: scales are uint8 (MXFP4), not float8_e4m3fn (NVFP4).
    """
    bits_NK = _bits(layout.planes).flatten(1)[:, :K]
    packed = pack((bits_NK >> 6 & 7 | bits_NK >> 12 & 8).to(torch.uint8))
    byte_NG = layout.scale.t().int()
    if exponents:
        largest_N = 129 - torch.frexp(layout.divisor).exponent
        return packed, ((byte_NG >> 3) - TOP + largest_N[:, None]).to(torch.uint8).contiguous()
    s_NG = torch.ldexp(1 + (byte_NG & 7).float() / 8, (byte_NG >> 3) - TOP + E4M3_TOP)
    return packed, s_NG.masked_fill_(byte_NG == 8, 0).to(torch.float8_e4m3fn).contiguous()


def dense(layout: Layout, K: int, dtype: torch.dtype) -> Tensor:
    """W [N, K]: (code * scale) in float32, rounded to ``dtype``, equal to the reference on the checkpoint."""
    G, N = layout.scale.shape
    bits_NBjc = _bits(layout.planes)
    values = torch.tensor(VALUES, device=layout.planes.device, dtype=torch.float32)
    code_NK = (values[bits_NBjc >> 6 & 7] * (1 - (bits_NBjc >> 14 & 2))).flatten(1)[:, :K]
    byte_NG = layout.scale.t().int()
    s_NG = torch.ldexp(1 + (byte_NG & 7).float() / 8, (byte_NG >> 3) - TOP + 1) / layout.divisor[:, None]
    return (code_NK.reshape(N, G, -1) * s_NG.unsqueeze(-1)).view(N, K).to(dtype)


def _bits(planes_NP: Tensor) -> Tensor:
    """int32 [N, K / 128, 4, 32] with the code of each column at the positions of element 0."""
    w_NB1c = planes_NP.view(len(planes_NP), -1, 1, PLANE).int()
    first, second, third = (w_NB1c << shift for shift in (0, 3, 6))
    last = (w_NB1c >> 4 & 0xC0) | (w_NB1c >> 5 & 0x100) | (w_NB1c << 1 & 0x8000)
    return torch.cat([first, second, third, last], 2)


def _planes(codes_NK: Tensor) -> Tensor:
    """Planes int16 [N, P] of codes 0 to 15."""
    codes_NK = F.pad(codes_NK, (0, -codes_NK.shape[1] % BLOCK))
    codes_jNBc = codes_NK.view(len(codes_NK), -1, PLANES, PLANE).movedim(2, 0)
    sign, size = codes_jNBc >> 3, codes_jNBc & 7
    words = sign[3] << 14 | size[3] >> 2 << 13 | (size[3] & 3) << 10
    for j in range(3):
        words = words | sign[j] << 15 - 3 * j | size[j] << 6 - 3 * j
    return words.to(torch.int16).flatten(1)  # wraps above 2^15, as intended


def _check(weight_packed: Tensor, scale_NG: Tensor, global_scale: Tensor | None) -> None:
    if weight_packed.dtype != torch.uint8 or scale_NG.dtype not in (torch.uint8, torch.float8_e4m3fn):
        raise ValueError(
            f"expected weight_packed uint8 and weight_scale float8_e4m3fn (NVFP4) or uint8 (MXFP4), got "
            f"{weight_packed.dtype} and {scale_NG.dtype}; pass the tensors of the checkpoint"
        )
    if weight_packed.ndim != 2 or scale_NG.ndim != 2 or len(scale_NG) != len(weight_packed):
        raise ValueError(
            f"expected weight_packed [N, K / 2] and weight_scale [N, G], got {tuple(weight_packed.shape)} and "
            f"{tuple(scale_NG.shape)}"
        )
    K, G = weight_packed.shape[1] * 2, scale_NG.shape[1]
    if not G or K % G or not K:
        raise ValueError(f"{G} groups do not divide K={K} columns; expected weight_scale [N, G] with G a divisor of K")
    if global_scale is not None and (global_scale.numel() != 1 or scale_NG.dtype == torch.uint8):
        raise ValueError(
            f"expected one global scale, of NVFP4 only, got {tuple(global_scale.shape)} beside {scale_NG.dtype} scales"
        )
    s_NG = scales(scale_NG, torch.float32)
    nan = scale_NG == 255 if scale_NG.dtype == torch.uint8 else s_NG.isnan()
    if nan.any() or (s_NG < 0).any():
        raise ValueError("weight_scale holds NaN or negative scales; the checkpoint is damaged: write it again")
