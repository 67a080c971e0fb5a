"""The grid that a column is rounded to, with the order of operations of compressed-tensors.

    integers     q = (clamp(round(a / s + z), low, high) - z) s
    floats       q = clamp(round_to_float(a / s), low, high) s         E2M1 (4 bits), E2M3 (6 bits), E4M3 (8 bits)

Then q is rounded to the dtype that stores it: to 16 bits, for microscaled formats to bfloat16 first.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Grid", "round_float_"]

MANTISSA = {4: 1, 6: 3, 8: 3}  # bits after the point
EXPONENT = {4: 0, 6: 0, 8: -6}  # the least exponent; below 2^EXPONENT the spacing stays the same
LARGEST = {4: 6.0, 6: 7.5, 8: 448.0}


@dataclass(frozen=True)
class Grid:
    """The values that :meth:`nearest_` rounds to.

    Args:
        low: Lowest code, or lowest number of the format.
        high: Highest code, or highest number of the format.
        float_bits: Format of floating-point codes: 4 (E2M1), 6 (E2M3), 8 (E4M3); 0: integers.
        stored: Dtype that stores the values, float16, bfloat16, float32 or float64; they are rounded to it.
        through_bf16: Round to bfloat16 before ``stored``.

    Raises:
        ValueError: ``float_bits`` or ``stored`` is none of these.
    """

    low: float
    high: float
    float_bits: int = 0
    stored: torch.dtype = torch.float32
    through_bf16: bool = False

    def __post_init__(self) -> None:
        if self.float_bits not in (0, *MANTISSA):
            raise ValueError(f"float_bits must be 0 for integers, or 4, 6 or 8, got {self.float_bits}")
        if self.stored not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"values are stored in float16, bfloat16, float32 or float64, got {self.stored}")

    def nearest_(self, a_R: Tensor, s_R: Tensor, z_R: Tensor | None, out: Tensor) -> None:
        """Write the grid points nearest to a column into ``out``; all tensors in one dtype, float32 or wider."""
        torch.div(a_R, s_R, out=out)
        if self.float_bits:
            round_float_(out, self.float_bits)
        elif z_R is None:
            out.round_().clamp_(self.low, self.high)
        else:
            out.add_(z_R).round_().clamp_(self.low, self.high).sub_(z_R)
        out.mul_(s_R)
        if self.through_bf16 or self.stored != out.dtype:
            out.copy_((out.to(torch.bfloat16) if self.through_bf16 else out).to(self.stored))


def round_float_(x: Tensor, bits: int) -> Tensor:
    """Round to the nearest number of the format, ties to even, saturating; in place.

    Args:
        x: Numbers, float32 or wider.
        bits: Format, 4 (E2M1), 6 (E2M3) or 8 (E4M3).
    """
    x.clamp_(-LARGEST[bits], LARGEST[bits])
    if bits == 8 and x.is_cuda:
        return x.copy_(x.to(torch.float8_e4m3fn))
    # The power of two in x, read from its exponent: frexp and ldexp take nine times as long, casts to float8 six times
    integers, exponent = (torch.int32, 0xFF << 23) if x.dtype == torch.float32 else (torch.int64, 0x7FF << 52)
    power = (x.view(integers) & exponent).view(x.dtype)
    step = power.clamp_(min=2.0 ** EXPONENT[bits]).mul_(2.0 ** -MANTISSA[bits])
    return x.div_(step).round_().mul_(step)
