"""The layout that the kernel reads: two codes in a byte, in planes of neighbouring columns, made once after loading.

Columns are in blocks of two planes (the last is padded with zeros): the lower half of byte c of block b is column
2 L b + c, the upper half column 2 L b + L + c, with planes of L = 64 columns, or 32 where the group size is not a
multiple of 64. Four neighbouring columns are in a 32-bit register, which is the order of 8-bit operands of the tensor
cores.

The four bits of a code v are v where it is positive or 0, and 8 + (-v - 1) where it is negative. With zeros above, bits
of the first kind are e4m3 numbers: byte n is n 2^-9, for subnormal numbers and the first normal ones, 0 to 15. Adding
0x79 to the others gives a sign and -v: one product with the sign bits adds it to four codes, and -8 is exact as well.

Shapes: N output features, K input features, G groups, P bytes in a row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.ops.w4a8_gemm.reference import signed

__all__ = ["PLANES", "codes", "plane_of", "to_planes"]

PLANES = 2


def plane_of(K: int, groups: int) -> int:
    """Number of columns in a plane."""
    return 64 if groups == 1 or K // groups % 64 == 0 else 32


def to_planes(weight: Tensor, K: int, groups: int) -> Tensor:
    """Planes int8 [N, P] of the checkpoint's codes.

    Args:
        weight: Codes, int32 [N, ceil(K / 8)] (pack-quantized), or int8 [N, K] of -8 to 7 (int-quantized).
        K: Number of columns.
        groups: Number of groups G; the width of planes depends on it.

    Raises:
        ValueError: Wrong dtype or shape, or the number of groups does not divide K.
    """
    columns = {torch.int32: -(-K // 8), torch.int8: K}.get(weight.dtype)
    if weight.ndim != 2 or weight.shape[1] != columns:
        raise ValueError(
            f"expected weight_packed int32 [N, {-(-K // 8)}] or codes int8 [N, {K}], got {weight.dtype} "
            f"{tuple(weight.shape)}; pass the tensor of the checkpoint and the K of its layer"
        )
    if groups < 1 or K % groups:
        raise ValueError(f"{groups} groups do not divide K={K} columns; pass the G of weight_scale [N, G]")
    plane = plane_of(K, groups)
    v_NK = F.pad(signed(weight, K).int(), (0, -K % (PLANES * plane)))
    nibble_NBjc = torch.where(v_NK < 0, 7 - v_NK, v_NK).view(len(v_NK), -1, PLANES, plane)
    return (nibble_NBjc[:, :, 0] | nibble_NBjc[:, :, 1] << 4).to(torch.int8).flatten(1)  # wraps, as intended


def codes(planes_NP: Tensor, K: int, groups: int) -> Tensor:
    """The reverse of :func:`to_planes`: int8 [N, K], -8 to 7."""
    byte_NBc = planes_NP.view(len(planes_NP), -1, plane_of(K, groups)).int()
    nibble_NK = torch.stack([byte_NBc & 15, byte_NBc >> 4 & 15], 2).flatten(1)[:, :K]
    return torch.where(nibble_NK > 7, 7 - nibble_NK, nibble_NK).to(torch.int8)
