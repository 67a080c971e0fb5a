"""A histogram whose bins are those of a short float: it needs no range beforehand, and histograms can be added.

A bin is the sign, the exponent and the first mantissa bits of a number, and is 3 % wide. Batches, their order and the
number of ranks change nothing: counts are summed.
"""

import torch
from torch import Tensor

__all__ = ["BINS", "bins_of", "edges", "points"]

MANTISSA, LOWEST, EXPONENTS = 32, -32, 64  # bins per octave; 2^-32 ... 2^32, the last bin holds all beyond
BINS = 2 * MANTISSA * EXPONENTS  # in the order of the numbers: negative ones first
SPREAD = 4  # points that stand for a bin


def bins_of(x: Tensor) -> Tensor:
    """Count of each bin, float64 [BINS], on the device of x."""
    magnitude, exponent = torch.frexp(x.float().flatten().abs())  # magnitude in [.5, 1), or 0
    step = ((magnitude * 2 - 1) * MANTISSA).floor().clamp_(0, MANTISSA - 1).long()
    place = ((exponent.long() - 1 - LOWEST) * MANTISSA + step).clamp_(0, BINS // 2 - 1)
    place = torch.where(magnitude == 0, 0, place)
    signed = torch.where(x.flatten() < 0, BINS // 2 - 1 - place, BINS // 2 + place)
    if x.is_cuda:  # bincount would make the host wait, for the largest bin
        counts = torch.zeros(BINS, dtype=torch.int64, device=x.device)
        return counts.scatter_add_(0, signed, torch.ones_like(signed)).double()
    return torch.bincount(signed, minlength=BINS).double()


def edges() -> tuple[Tensor, Tensor]:
    """Lower and upper end of each bin, float64 [BINS]."""
    octave = 2.0 ** torch.arange(LOWEST, LOWEST + EXPONENTS, dtype=torch.float64, device="cpu")
    inner = (octave[:, None] * (1 + torch.arange(MANTISSA, dtype=torch.float64, device="cpu") / MANTISSA)).flatten()
    outer = torch.cat([inner[1:], inner.new_tensor([2.0 ** (LOWEST + EXPONENTS)])])
    inner = torch.cat([inner.new_zeros(1), inner[1:]])  # the first bin reaches down to zero
    return torch.cat([-outer.flip(0), inner]), torch.cat([-inner.flip(0), outer])


def points(counts: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """Values that represent the counted numbers, their counts, and the width of each value; float64 [points].

    No value lies outside of ``low`` and ``high``, the smallest and the largest number that were counted.
    """
    seen = counts > 0
    lower, upper = (end[seen, None].clamp(low, high) for end in edges())
    at = (torch.arange(SPREAD, dtype=torch.float64, device="cpu") + 0.5) / SPREAD
    width = (upper - lower).expand(-1, SPREAD) / SPREAD
    return (
        (lower + (upper - lower) * at).flatten(),
        (counts[seen, None] / SPREAD).expand(-1, SPREAD).flatten(),
        (width.flatten().clamp(min=torch.finfo(torch.float32).tiny)),
    )
