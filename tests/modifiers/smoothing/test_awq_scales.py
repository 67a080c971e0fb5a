"""The grid of AWQ, its formula, the exact error of a layer, and the best range of each group against a loop."""

import pytest
import torch
from torch.testing import assert_close

from lightning_compress.modifiers.smoothing.awq_scales import (
    AT_ONCE,
    CLIPS,
    GridPoint,
    awq_scale,
    clipped,
    grid,
    group_sizes,
    layer_errors,
    rounded_with,
)
from lightning_compress.quant.fake_quant import round_weight
from lightning_compress.quant.scales import minmax
from tests.support.quantization_runs import correlated, int4

GRAINS = {
    "group": int4(group_size=16),
    "asymmetric": int4(group_size=8, symmetric=False),
    "channel": int4(strategy="channel"),
    "tensor": int4(strategy="tensor"),
}


def test_the_grid_begins_with_rounding_to_nearest():
    assert grid(1, True) == grid(1, False) == [GridPoint(0.0, False)]
    assert [p.ratio for p in grid(5, False)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert grid(4, True) == [GridPoint(0.0, False), GridPoint(0.0, True), GridPoint(0.5, True), GridPoint(1.0, True)]
    for duo in (True, False):
        points = grid(20, duo)
        assert len(points) == len(set(points)) == 20
        assert [p.is_identity for p in points] == [True] + [False] * 19


def test_the_scale_is_that_of_the_paper():
    x, w = torch.tensor([1.0, 4.0, 16.0, 0.0]), torch.tensor([0.5, 0.25, 0.125, 0.7])
    plain = torch.tensor([1.0, 2.0, 4.0])
    assert_close(awq_scale(x, w, GridPoint(0.5, False))[:3], plain / 2)  # sqrt(max min) = 2
    duo = plain / (w[:3].sqrt() + 1e-4)
    assert_close(awq_scale(x, w, GridPoint(0.5, True))[:3], duo / (duo.max() * duo.min()).sqrt())
    for point in grid(20, True):
        s = awq_scale(x, w, point)
        assert s[3] == 1  # always zero
        assert bool(((s > 0) & s.isfinite()).all())
    assert torch.equal(awq_scale(x, w, GridPoint(0.0, False)), torch.ones(4))


@pytest.mark.parametrize("grain", GRAINS)
def test_sizes_of_columns_within_their_groups(grain):
    W = torch.randn(6, 32)
    sizes = group_sizes(W, GRAINS[grain])
    g = {"group": 16, "asymmetric": 8, "channel": 32, "tensor": 32}[grain]
    for column in (0, 7, 19):
        start = column // g * g
        top = [W.abs().max() if grain == "tensor" else W[row, start : start + g].abs().max() for row in range(6)]
        expected = torch.stack([W[row, column].abs() / (t + 1e-6) for row, t in enumerate(top)]).mean()
        assert_close(sizes[column], expected)


@pytest.mark.parametrize("grain", GRAINS)
def test_the_error_of_a_layer_is_that_of_its_outputs(grain, monkeypatch):
    """All points at once, against a loop that computes outputs."""
    monkeypatch.setattr("lightning_compress.modifiers.smoothing.awq_scales.AT_ONCE", 400)  # in pieces of two points
    torch.manual_seed(0)
    W, X, s_KC = torch.randn(6, 32), correlated(50, 32), torch.rand(5, 32) + 0.5
    errors = layer_errors(W, s_KC, GRAINS[grain], X.t() @ X / len(X))
    for s_C, error in zip(s_KC, errors, strict=True):
        Y = X @ rounded_with(W, s_C, GRAINS[grain]).t()
        assert float(error) == pytest.approx(float((Y - X @ W.t()).square().sum() / len(X)), rel=1e-3)
    assert AT_ONCE > 400


@pytest.mark.parametrize("grain", [grain for grain in GRAINS if grain != "tensor"])
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
