"""The formula of logarithmic equalization: afterwards a channel reaches log2(2 + max |x|)."""

import torch
from torch.testing import assert_close

from lightning_compress.modifiers.smoothing.logarithmic_equalization import equalizing_scale


def test_the_formula():
    assert_close(equalizing_scale(torch.tensor([2.0, 14.0, 0.0])), torch.tensor([1.0, 3.5, 1.0]))
    x = torch.tensor([0.01, 1.0, 100.0, 1e4])
    assert_close(x / equalizing_scale(x), torch.log2(2 + x))
