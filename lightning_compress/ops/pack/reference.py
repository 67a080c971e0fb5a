"""Reference of the ops, slow and obvious.

    u_c = code_c + 2^(b - 1)        bit i of u_c is bit b c + i of the row; bit 32 w + j of the row is bit j of word w

So codes of 3, 5, 6 and 7 bits may extend over two words, and 32 codes fill b words. Unused bits of the last word are 0.

Shapes: C codes of b bits in a row, P = ceil(C b / 32) words.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["pack", "unpack"]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Words int32 [..., P] of codes int8 [..., C]."""
    each = (codes.int() + 2 ** (bits - 1)).unsqueeze(-1) >> torch.arange(bits, device=codes.device) & 1
    row = each.flatten(-2)
    words = F.pad(row, (0, -row.shape[-1] % 32)).unflatten(-1, (-1, 32)).long() << torch.arange(32, device=codes.device)
    return words.sum(-1).to(torch.int32)  # wraps above 2^31, as intended


def unpack(words: Tensor, bits: int, size: int) -> Tensor:
    """Codes int8 [..., C = size] of words int32 [..., P]."""
    row = (words.unsqueeze(-1) >> torch.arange(32, device=words.device) & 1).flatten(-2)[..., : size * bits]
    each = row.unflatten(-1, (size, bits)) << torch.arange(bits, device=words.device)
    return (each.sum(-1) - 2 ** (bits - 1)).to(torch.int8)
