"""The search against the same formulas for all rows at once, to the bit: leaving rows out changes nothing."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from lightning_compress.ops.scale_search import reference
from lightning_compress.quant import scales
from lightning_compress.quant.scale_errors import GridErrors

GRIDS = {
    f"{bits} bits {'sym' if symmetric else 'asym'}, p = {power}": ({"num_bits": bits, "symmetric": symmetric}, power)
    for bits, power in ((2, 2.0), (3, 2.0), (4, 2.0), (4, 2.4), (8, 2.0))
    for symmetric in (True, False)
} | {"fp8": ({"num_bits": 8, "type": "float"}, 2.0)}


@pytest.mark.parametrize("name", GRIDS)
def test_leaving_rows_out_changes_no_bit(name, monkeypatch):
    """Heavy tails and importances of all sizes, so that rows stop falling at different factors."""
    grid, power = GRIDS[name]
    args = QuantizationArgs(group_size=64, strategy="group", **grid)
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(512, 192, generator=generator)
    W *= 1 + 4 * torch.rand(512, 1, generator=generator) * torch.randn(512, 192, generator=generator) ** 2
    W[0, 1:64] *= 1e-3  # goes on below the usual factors
    h = torch.randn(192, generator=generator).exp()
    rows = []
    plain = GridErrors.each
    monkeypatch.setattr(GridErrors, "each", lambda self, candidates: rows.append(self.rows) or plain(self, candidates))
    scale, zero = scales.search(W, args, h, power)
    every = reference.scale_search(W, h, 64, args.num_bits, args.symmetric, args.type == "float", power)
    assert torch.equal(scale, every[0])
    assert (zero is every[1] is None) or torch.equal(zero, every[1])
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
