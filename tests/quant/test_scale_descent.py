"""The search against the same formulas for all rows at once, to the bit: leaving rows out changes nothing."""

import math

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from lightning_compress.quant import scales
from lightning_compress.quant.formats import round_float_
from lightning_compress.quant.scale_descent import LOWEST, PATIENCE, RATIO, descend
from lightning_compress.quant.scale_errors import GridErrors, integer_range

GRIDS = {
    f"{bits} bits {'sym' if symmetric else 'asym'}, p = {power}": ({"num_bits": bits, "symmetric": symmetric}, power)
    for bits, power in ((2, 2.0), (3, 2.0), (4, 2.0), (4, 2.4), (8, 2.0))
    for symmetric in (True, False)
} | {"fp8": ({"num_bits": 8, "type": "float"}, 2.0)}


class EveryRow:
    """errors(f, dz) and fit(f, dz) by their formulas, each time for all rows."""

    def __init__(self, t: Tensor, z: Tensor | None, h: Tensor, power: float, args: QuantizationArgs):
        self.t, self.z, self.h, self.power, self.args = t, z, h, power, args
        self.low, self.high = integer_range(args)

    def codes(self, f: Tensor | float, shift: float | Tensor) -> Tensor:
        q = self.t * (1 / f)
        if self.args.type == "float":
            return round_float_(q, self.args.num_bits)
        if self.z is None:
            return q.round().clamp(self.low, self.high)
        z = (self.z + shift)[..., None]
        return (q + z).round().clamp(self.low, self.high) - z

    def weighted(self, e: Tensor) -> Tensor:
        return torch.stack([e_r @ h for e_r, h in zip(e, self.h, strict=True)])

    def __call__(self, f: Tensor | float, shift: float | Tensor) -> Tensor:
        if isinstance(f, Tensor):
            e = self.codes(f[..., None], shift) * f[..., None] - self.t
        else:
            e = torch.sub(self.t, self.codes(f, shift), alpha=f)
        sums = self.weighted(e * e if self.power == 2 else e.abs().pow(self.power))
        if self.z is None:
            return sums
        z = self.z + shift
        return sums.masked_fill((z < self.low) | (z > self.high), math.inf)

    def fit(self, f: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        q = self.codes(f[..., None], shift)
        return self.weighted(self.t * q), self.weighted(q * q)


def descend_every_row(errors: EveryRow) -> tuple[Tensor, Tensor]:
    best = errors(1.0, 0.0)
    best_f, best_shift = torch.ones_like(best), torch.zeros_like(best)

    def improve(f: Tensor | float, shift: Tensor | float, among: Tensor | bool = True) -> Tensor:
        nonlocal best, best_f, best_shift
        error = errors(f, shift)
        better = (error < best) & among
        best, best_f = torch.where(better, error, best), torch.where(better, f, best_f)
        best_shift = torch.where(better, shift, best_shift)
        return better

    bits = errors.args.num_bits
    f = (errors.high - errors.low) / 2 / errors.high
    while f > LOWEST[bits]:
        fell, f = improve(f, 0.0), f * RATIO[bits]
    patience = PATIENCE * fell
    while (patience > 0).any() and f > torch.finfo(torch.float32).eps:
        patience, f = (patience - 1).masked_fill(improve(f, 0.0, patience > 0), PATIENCE), f * RATIO[bits]
    for root in (2,) if errors.power == 2 else (2, 4):
        middle = best_f
        improve(middle * RATIO[bits] ** (1 / root), 0.0)
        improve(middle / RATIO[bits] ** (1 / root), 0.0)
    if errors.z is not None:
        improve(best_f, -1.0)
        improve(best_f, 1.0)
    if errors.power == 2:
        above, below = errors.fit(best_f, best_shift)
        improve((above / below).where((above > 0) & (below > 0), best_f), best_shift)
    return best_f, best_shift


@pytest.mark.parametrize("name", GRIDS)
def test_leaving_rows_out_changes_no_bit(name, monkeypatch):
    """Heavy tails and importances of all sizes, so that rows stop falling at different factors."""
    grid, power = GRIDS[name]
    args = QuantizationArgs(strategy="channel", **grid)
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(3, 512, 64, generator=generator)
    W *= 1 + 4 * torch.rand(3, 512, 1, generator=generator) * torch.randn(3, 512, 64, generator=generator) ** 2
    W[0, 0, 1:] *= 1e-3  # goes on below the usual factors
    h = torch.randn(3, 64, generator=generator).exp()
    scale, zero = scales.minmax(W.flatten(0, 1), args)
    t, z = W / scale.view(3, 512, 1), None if zero is None else zero.view(3, 512).float()
    rows = []
    plain = GridErrors.__call__
    monkeypatch.setattr(GridErrors, "__call__", lambda self, f, dz: rows.append(self.rows) or plain(self, f, dz))
    f_r, shift_r = descend(GridErrors(t, z, h, power, args))
    f_GR, shift_GR = descend_every_row(EveryRow(t, z, h, power, args))
    assert torch.equal(f_r, f_GR.flatten())
    assert torch.equal(shift_r, shift_GR.flatten())
    assert min(rows) < 3 * 512 / 4


@pytest.mark.parametrize("power", [2.0, 2.4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_clipped_is_a_bound_below_the_errors(symmetric, power):
    args = QuantizationArgs(num_bits=3, strategy="channel", symmetric=symmetric)
    generator = torch.Generator().manual_seed(0)
    t, h = 4 * torch.randn(2, 40, 16, generator=generator), torch.rand(2, 16, generator=generator)
    errors = GridErrors(t, None if symmetric else torch.full((2, 40), -1.0), h, power, args)
    for f in (1.2, 0.9, 0.6, 0.3):
        bound = errors.clipped(f).nan_to_num().clone()
        for lower in (f, 0.9 * f, 0.5 * f, 0.1 * f):
            assert (bound <= errors(lower, 0.0) * (1 + 1e-5)).all()
    assert bound.min() > 0
