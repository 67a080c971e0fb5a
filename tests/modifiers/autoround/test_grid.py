"""Learned grids: iterate 0 is rounding to nearest, gradients are those of the rounding taken straight, bounds hold."""

import pytest
import torch
from torch import Tensor

from lightning_compress.modifiers.autoround.grid import LearnedGrid
from lightning_compress.quant.fake_quant import round_weight
from lightning_compress.quant.rounding import find_scales
from lightning_compress.quant.scales import expand, group_columns, integer_range
from lightning_compress.quant.schemes import from_groups
from tests.support.quantization_runs import correlated

R, C = 6, 32
GRAINS = {
    "group": {"group_size": 8},
    "asymmetric": {"group_size": 16, "symmetric": False},
    "channel": {"strategy": "channel"},
    "channel_asymmetric": {"strategy": "channel", "symmetric": False},
    "tensor": {"strategy": "tensor"},
    "tensor_asymmetric": {"strategy": "tensor", "symmetric": False},
}


def args(grain: str, bits: int = 3):
    return from_groups({"g": {"targets": ["Linear"], "weights": {"num_bits": bits, **GRAINS[grain]}}})[0].weights


def weight(dtype: torch.dtype = torch.float32) -> Tensor:
    """One row is zero, one positive, one has an outlier."""
    W_RC = torch.randn(R, C, generator=torch.Generator().manual_seed(0))
    W_RC[1] = 0
    W_RC[2] = W_RC[2].abs() + 0.5
    W_RC[3, 5] = 9
    return W_RC.to(dtype)


def learned(grain: str, bits: int = 3, dtype: torch.dtype = torch.float32, how: str = "minmax", keep=None):
    grid = args(grain, bits)
    return LearnedGrid(weight(dtype), *find_scales(weight(dtype), grid, how), grid, keep)


def wandered(grain: str, bits: int = 3, dtype: torch.dtype = torch.float32) -> LearnedGrid:
    """V, alpha and beta anywhere."""
    grid = learned(grain, bits, dtype)
    generator = torch.Generator().manual_seed(1)
    grid.V_RC = torch.rand(R, C, generator=generator) - 0.5
    grid.beta = 1 - 0.5 * torch.rand(grid.beta.shape, generator=generator)
    if grid.alpha is not None:
        grid.alpha = 1 - 0.5 * torch.rand(grid.alpha.shape, generator=generator)
    return grid


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["minmax", "mse"])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("grain", GRAINS)
def test_iterate_0_is_rounding_to_nearest_bit_for_bit(grain, bits, how, dtype):
    grid, W_RC = learned(grain, bits, dtype, how), weight(dtype)
    scale, zero_point = find_scales(W_RC, grid.args, how)
    now = grid.now()
    assert torch.equal(now.value(), round_weight(W_RC, scale, zero_point, grid.args))
    assert torch.equal(now.scale, scale)
    assert now.scale.dtype == now.value().dtype == dtype
    if zero_point is not None:
        assert torch.equal(now.zero_point, zero_point)
        assert now.zero_point.dtype == torch.int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("grain", GRAINS)
def test_any_iterate_is_a_weight_on_its_stored_grid(grain, bits, dtype):
    """Codes are in range, and whoever rounds again with the stored scales finds the same weight."""
    grid = wandered(grain, bits, dtype)
    low, high = integer_range(grid.args)
    for rate in (0.1, 0.4, 3.0):
        grid.step(torch.randn(R, C, generator=torch.Generator().manual_seed(2)), rate)
        now = grid.now()
        zero = (
            0
            if now.zero_point is None
            else expand(now.zero_point, R, grid.args).repeat_interleave(group_columns(grid.args, C), 1)
        )
        codes = now.codes_RC + zero
        assert codes.min() >= low
        assert codes.max() <= high
        assert (now.scale > 0).all()
        assert torch.equal(round_weight(now.value(), now.scale, now.zero_point, grid.args), now.value())
        assert grid.V_RC.abs().max() <= 0.5
        for end in (grid.beta, grid.alpha):
            assert end is None or (end.min() >= 0.5 and end.max() <= 1)


def surrogate(grid: LearnedGrid, G_RC: Tensor, V: Tensor, alpha: Tensor | None, beta: Tensor, at: dict) -> Tensor:
    """sum G q in float64, one weight after the other, as the paper writes it: by the extremes of the range.

    ``at`` holds what rounding added at the point where the gradient is taken, and who was clipped there: both stay as
    they are, which is what straight-through means. It is filled at the first call.
    """
    low, high = integer_range(grid.args)
    g, total = group_columns(grid.args, C), torch.zeros((), dtype=torch.float64)
    for r in range(R):
        for k in range(C // g):
            where = (r, k) if grid.scale.ndim == 2 else (0,)
            s0 = grid.scale[where].double()
            if alpha is None:
                s, z = s0 * beta[where], torch.zeros((), dtype=torch.float64)
            else:
                z0 = grid.zero_point[where].double()
                smallest, largest = (low - z0) * s0, (high - z0) * s0
                s = (beta[where] * largest - alpha[where] * smallest) / (high - low)
                z = low - alpha[where] * smallest / s
                z = z + at.setdefault(("z", r, k), z.round() - z)
            for c in range(k * g, (k + 1) * g):
                code = grid.W_RC[r, c].double() / s + V[r, c] + z
                code = code + at.setdefault(("u", r, c), code.round() - code)
                end = at.setdefault(("end", r, c), low if code < low else high if code > high else None)
                total = total + G_RC[r, c] * s * ((code if end is None else end) - z)
    return total


@pytest.mark.parametrize("grain", GRAINS)
def test_gradients_are_differences_of_the_surrogate(grain):
    grid = wandered(grain)
    G_RC = torch.randn(R, C, generator=torch.Generator().manual_seed(3)).double()
    point = [grid.V_RC.double(), None if grid.alpha is None else grid.alpha.double(), grid.beta.double()]
    at: dict = {}
    here = surrogate(grid, G_RC, *point, at)
    torch.testing.assert_close((G_RC * grid.now().value().double()).sum(), here, rtol=1e-5, atol=1e-5)
    assert len({end for key, end in at.items() if key[0] == "end"}) > 1  # some are clipped, some are not
    for number, found in enumerate(grid.gradients(G_RC.float())):
        if found is None:
            assert point[number] is None
            continue
        for index in torch.randperm(found.numel(), generator=torch.Generator().manual_seed(4))[:12].tolist():
            ends = []
            for step in (1e-5, -1e-5):
                moved = [None if p is None else p.clone() for p in point]
                moved[number].view(-1)[index] += step
                ends.append(surrogate(grid, G_RC, *moved, at))
            expected = float(ends[0] - ends[1]) / 2e-5
            assert float(found.flatten()[index]) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_a_step_goes_against_the_sign_and_stops_at_the_bounds():
    grid, G_RC = learned("group"), torch.randn(R, C, generator=torch.Generator().manual_seed(5))
    dV_RC, _, dbeta = grid.gradients(G_RC)
    grid.step(G_RC, 0.1)
    torch.testing.assert_close(grid.V_RC, -0.1 * dV_RC.sign())
    torch.testing.assert_close(grid.beta, (1 - 0.1 * dbeta.sign()).clamp(0.5, 1))
    for _ in range(20):
        grid.step(G_RC, 0.1)
    assert grid.V_RC.abs().max() == 0.5


def test_zeros_that_are_kept_stay_and_get_no_gradient():
    keep = torch.rand(R, C, generator=torch.Generator().manual_seed(6)) > 0.5
    grid = learned("asymmetric", keep=keep)
    for seed in range(4):
        grid.step(torch.randn(R, C, generator=torch.Generator().manual_seed(seed)), 0.3)
    assert (grid.now().value()[~keep] == 0).all()
    assert (grid.V_RC[~keep] == 0).all()
    assert (grid.V_RC[keep] != 0).any()


def test_sign_descent_on_a_row_gets_near_the_best_of_all_roundings():
    """Eight weights, their outputs' error known exactly: against all 2^8 ways to round up or down."""
    from itertools import product

    X = correlated(64, 8)
    H, grid_args = X.t() @ X / 64, args("channel", 3)
    W = torch.randn(1, 8, generator=torch.Generator().manual_seed(7))
    grid = LearnedGrid(W, *find_scales(W, grid_args, "minmax"), grid_args)

    def loss(Q: Tensor) -> float:
        return float((Q - W) @ H @ (Q - W).t())

    s = grid.scale
    floor = (W / s).floor()
    best = min(loss(((floor + torch.tensor(ups)).clamp(-4, 3)) * s) for ups in product((0.0, 1.0), repeat=8))
    rounded = found = loss(grid.now().value())
    grid.beta.fill_(1.0)
    for t in range(200):
        Q = grid.now().value()
        grid.step(2 * (Q - W) @ H, (1 - t / 200) / 200)
        found = min(found, loss(grid.now().value()))
    assert best < 0.9 * rounded
    assert found < 0.5 * (best + rounded)
