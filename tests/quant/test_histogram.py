"""Every number lies in its bin, counts add up, and points stand for what was counted."""

import torch
from torch.testing import assert_close

from lightning_compress.quant.histogram import BINS, bins_of, edges, points


def test_each_number_lies_between_the_edges_of_its_bin():
    x = torch.cat([torch.randn(300), torch.tensor([0.0, 1.0, -1.0, 2.0**-40, 1e9, -3.5])])
    lower, upper = edges()
    assert lower.shape == upper.shape == (BINS,)
    assert torch.equal(lower[1:], upper[:-1])
    for value in x:
        (place,) = bins_of(value[None]).nonzero().flatten()
        assert lower[place] <= value <= upper[place]


def test_parts_of_the_data_add_up():
    x = torch.randn(1000)
    assert torch.equal(bins_of(x), bins_of(x[:137]) + bins_of(x[137:]))
    assert bins_of(x).sum() == 1000


def test_points_keep_the_number_and_nearly_the_mean_of_what_they_stand_for():
    x = torch.randn(2000).double() * 5
    values, counts, widths = points(bins_of(x), float(x.min()), float(x.max()))
    assert_close(counts.sum().item(), 2000.0)
    assert x.min() <= values.min()
    assert values.max() <= x.max()
    assert ((values * counts).sum() / 2000 - x.mean()).abs() < 0.03 * x.abs().mean()
    assert (widths > 0).all()
