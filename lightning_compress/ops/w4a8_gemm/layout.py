"""The weight as the kernel reads it: two codes to a byte, in planes of neighbouring columns, made once when loading.

Columns come in blocks of two planes (the last is filled up with zeros): the lower half of byte c of block b is column
2 L b + c, the upper half column 2 L b + L + c, with planes of L = 64 columns, 32 where groups are no multiple of 64.
Four neighbouring columns lie in a 32-bit register, as the tensor cores want 8-bit operands.

The four bits of a code v are v where it is positive or 0, and 8 + (-v - 1) where it is negative. With zeros above, the
first are e4m3 already: byte n is n 2^-9, for subnormal numbers and the first normal ones, 0 to 15. Adding 0x79 to the
others makes a sign and -v: one product with the sign bits does it for four, and -8 is not lost.

Shapes: N output features, K input features, G groups, P bytes of a row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.ops.w4a8_gemm.reference import signed

__all__ = ["PLANES", "codes", "plane_of", "to_planes"]

PLANES = 2


def plane_of(K: int, groups: int) -> int:
    """Columns of a plane."""
    return 64 if groups == 1 or K // groups % 64 == 0 else 32


def to_planes(weight: Tensor, K: int, groups: int) -> Tensor:
    """int8 [N, P] of the checkpoint's codes.

    Args:
        weight: int32 [N, ceil(K / 8)] (pack-quantized), or int8 codes [N, K] of -8 to 7 (int-quantized).
        K: Columns.
        groups: G; how wide planes are depends on it.

    Raises:
        ValueError: Another dtype or shape, or groups that do not divide K.
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
    return (nibble_NBjc[:, :, 0] | nibble_NBjc[:, :, 1] << 4).to(torch.int8).flatten(1)  # wraps, as meant


def codes(planes_NP: Tensor, K: int, groups: int) -> Tensor:
    """The reverse of :func:`to_planes`: int8 [N, K], -8 to 7."""
    byte_NBc = planes_NP.view(len(planes_NP), -1, plane_of(K, groups)).int()
    nibble_NK = torch.stack([byte_NBc & 15, byte_NBc >> 4 & 15], 2).flatten(1)[:, :K]
    return torch.where(nibble_NK > 7, 7 - nibble_NK, nibble_NK).to(torch.int8)
