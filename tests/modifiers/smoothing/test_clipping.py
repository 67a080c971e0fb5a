"""The range of each group is the best one, against a loop over rows, groups and ranges."""

import pytest
import torch

from lightning_compress.modifiers.smoothing.clipping import CLIPS, clipped
from lightning_compress.quant.fake_quant import round_weight
from lightning_compress.quant.scales import minmax
from tests.support.quantization_runs import correlated, int4

GRAINS = {
    "group": int4(group_size=16),
    "asymmetric": int4(group_size=8, symmetric=False),
    "channel": int4(strategy="channel"),
}


@pytest.mark.parametrize("grain", GRAINS)
def test_clipping_takes_the_best_range_of_every_group(grain):
    grid_args = GRAINS[grain]
    torch.manual_seed(0)
    W, X = torch.randn(4, 32), correlated(80, 32)
    W[1, 5] = 9.0
    H = X.t() @ X / len(X)
    Q, g = clipped(W, grid_args, H), {"group": 16, "asymmetric": 8, "channel": 32}[grain]

    def loss(cut, row, cols):
        D = (round_weight(cut, *minmax(cut, grid_args), grid_args) - W)[row, cols]
        return float(D @ H[cols, cols] @ D)

    for row in range(4):
        for start in range(0, 32, g):
            cols = slice(start, start + g)
            top = W[row, cols].abs().max()  # not a float: an ulp decides how the limit is rounded
            best = min(loss(W.clamp(-top * c, top * c), row, cols) for c in CLIPS)
            assert loss(Q, row, cols) == pytest.approx(best, rel=1e-4)
    assert not torch.equal(Q, W)
