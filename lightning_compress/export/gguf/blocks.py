"""Codes of symmetric integer grids as blocks of GGUF (the layout of ggml).

    Q8_0   32 weights in 34 bytes: d in float16 | 32 codes in int8                 w = d c
    Q4_0   32 weights in 18 bytes: d in float16 | 16 bytes, the codes c + 8        w = d c
           of weights 0..15 in the low, of weights 16..31 in the high four bits

Shapes: R rows, C columns, G groups that share a scale, B = C / 32 blocks in a row.
"""

import torch
from torch import Tensor

__all__ = ["BLOCK", "block_scales", "q4_0", "q8_0"]

BLOCK = 32


def block_scales(scale_RG: Tensor, columns: int) -> tuple[Tensor, int, float]:
    """The scale of each block.

    Returns:
        d [R, B] in float16; how many of the scales float16 does not hold exactly; the largest relative difference.
    """
    d_RG = scale_RG.to(torch.float16)
    difference_RG = (d_RG.double() - scale_RG.double()).abs() / scale_RG.double()
    d_RB = d_RG.repeat_interleave(columns // BLOCK // scale_RG.shape[1], 1)
    return d_RB, int((difference_RG > 0).sum()), float(difference_RG.max())


def q8_0(codes_RC: Tensor, d_RB: Tensor) -> Tensor:
    """Bytes [R, 34 B] of codes in -128..127."""
    return _bytes(d_RB, codes_RC.unflatten(1, (-1, BLOCK)).to(torch.int8).contiguous().view(torch.uint8))


def q4_0(codes_RC: Tensor, d_RB: Tensor) -> Tensor:
    """Bytes [R, 18 B] of codes in -8..7."""
    q = (codes_RC + 8).to(torch.uint8).unflatten(1, (-1, 2, BLOCK // 2))
    return _bytes(d_RB, q[:, :, 0] | q[:, :, 1] << 4)


def _bytes(d_RB: Tensor, codes: Tensor) -> Tensor:
    return torch.cat([d_RB[..., None].contiguous().view(torch.uint8), codes], 2).flatten(1)
