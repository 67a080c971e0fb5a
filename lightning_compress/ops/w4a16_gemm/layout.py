"""The layout that the kernel reads: nibble planes, made once from the checkpoint's words, of the same size.

Columns are in blocks of 128 (the last is padded with zeros). Nibble j (0 to 3) of the 16-bit word c (0 to 31) of block
b is column k = 128 b + 32 j + c: one shift and one mask give 32 neighbouring columns, two in a 32-bit register, and the
same columns of x are contiguous. Any group of a multiple of 32 columns has one scale per plane.

Shapes: N output features, K input features, G groups, P = 32 ceil(K / 128) words in a row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.ops.w4a16_gemm.reference import CODES_PER_WORD, pack, unpack, unpack_zero

__all__ = ["BLOCK", "PLANE", "check_words", "from_grid_rows", "from_planes", "grid_rows", "to_planes"]

BLOCK = 128
PLANE = 32
PLANES = BLOCK // PLANE


def to_planes(weight_packed: Tensor) -> Tensor:
    """Planes int16 [N, P] of the checkpoint's words int32 [N, ceil(K / 8)]."""
    codes_NK = unpack(weight_packed, weight_packed.shape[1] * CODES_PER_WORD)
    codes_NK = F.pad(codes_NK, (0, -codes_NK.shape[1] % BLOCK))
    planes_NBjc = codes_NK.view(len(codes_NK), -1, PLANES, PLANE).int()
    return (planes_NBjc << _shifts(codes_NK.device)).sum(2).to(torch.int16).flatten(1)  # wraps above 2^15, as intended


def from_planes(planes_NP: Tensor, K: int) -> Tensor:
    """The reverse of :func:`to_planes`, bit for bit."""
    words_NB1c = planes_NP.view(len(planes_NP), -1, 1, PLANE).int()
    codes_NK = ((words_NB1c >> _shifts(planes_NP.device)) & 15).flatten(1)
    return pack(codes_NK[:, : -(-K // CODES_PER_WORD) * CODES_PER_WORD])


def grid_rows(scale_NG: Tensor, zero_packed: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scales [G, N] and zero points int8 [G, N] (or None): neighbouring rows of a tile are neighbours in memory."""
    zero_GN = None if zero_packed is None else unpack_zero(zero_packed, len(scale_NG)).t().contiguous()
    return scale_NG.t().contiguous(), zero_GN


def from_grid_rows(scale_GN: Tensor, zero_GN: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The reverse of :func:`grid_rows`, bit for bit."""
    return scale_GN.t().contiguous(), None if zero_GN is None else pack(zero_GN).t().contiguous()


def check_words(K: int, planes_NP: Tensor) -> None:
    """ValueError where rows of the planes do not hold K columns."""
    P = planes_NP.shape[1]
    if -(-K // BLOCK) * PLANE != P:
        raise ValueError(
            f"x has K={K} columns, a row of the weight has {P} words, which hold {P * 4 - BLOCK + 1} to {P * 4}; "
            f"pass the x of this layer"
        )


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(0, 4 * PLANES, 4, dtype=torch.int32, device=device).view(PLANES, 1)
