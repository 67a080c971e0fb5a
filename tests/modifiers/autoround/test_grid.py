"""Learned grids: iterate 0 is rounding to nearest, gradients are those of the rounding taken straight, bounds hold."""

import pytest
import torch
from torch import Tensor

from lightning_compress.modifiers.autoround.grid import LearnedGrid
from lightning_compress.ops.fake_quant import HALF_STEP
from lightning_compress.quant.fake_quant import round_weight
from lightning_compress.quant.formats import global_scale_of, has_global_scale, round_float_, spacing
from lightning_compress.quant.rounding import find_scales
from lightning_compress.quant.scales import expand, group_columns, integer_range
from lightning_compress.quant.schemes import from_groups
from tests.support.quantization_runs import correlated

MICROSCALED = {"num_bits": 4, "type": "float", "symmetric": True}

R, C = 6, 32
GRAINS = {
    "group": {"group_size": 8},
    "asymmetric": {"group_size": 16, "symmetric": False},
    "channel": {"strategy": "channel"},
    "channel_asymmetric": {"strategy": "channel", "symmetric": False},
    "tensor": {"strategy": "tensor"},
    "tensor_asymmetric": {"strategy": "tensor", "symmetric": False},
}
FLOATS = {
    "nvfp4": {"strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn},
    "mxfp4": {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
    "mxfp6": {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8, "num_bits": 6},
    "mxfp8": {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8, "num_bits": 8},
    "fp8": {"strategy": "channel", "num_bits": 8},
    "fp8_tensor": {"strategy": "tensor", "num_bits": 8},
    "fp8_blocks": {"strategy": "block", "block_structure": [4, 12], "num_bits": 8},  # blocks that are not full
}


def args(grain: str, bits: int = 3):
    grid = MICROSCALED | FLOATS[grain] if grain in FLOATS else {"num_bits": bits, **GRAINS[grain]}
    return from_groups({"g": {"targets": ["Linear"], "weights": grid}})[0].weights


def weight(dtype: torch.dtype = torch.float32) -> Tensor:
    """One row is zero, one positive, one has an outlier."""
    W_RC = torch.randn(R, C, generator=torch.Generator().manual_seed(0))
    W_RC[1] = 0
    W_RC[2] = W_RC[2].abs() + 0.5
    W_RC[3, 5] = 9
    return W_RC.to(dtype)


def learned(grain: str, bits: int = 3, dtype: torch.dtype = torch.float32, how: str = "minmax", keep=None):
    grid = args(grain, bits)
    g = global_scale_of(*weight(dtype).aminmax()) if has_global_scale(grid) else None
    return LearnedGrid(weight(dtype), *find_scales(weight(dtype), grid, how, global_scale=g), grid, keep, g)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["minmax", "mse"])
@pytest.mark.parametrize("grain", FLOATS)
def test_floats_begin_at_rounding_to_nearest_and_stay_on_their_stored_grid(grain, how, dtype):
    grid, W_RC = learned(grain, dtype=dtype, how=how), weight(dtype)
    scale, _ = find_scales(W_RC, grid.args, how)
    now = grid.now()
    assert torch.equal(now.value().to(dtype), round_weight(W_RC, scale, None, grid.args))
    assert torch.equal(now.scale, scale)
    changed = 0
    for seed, rate in enumerate((0.1, 0.2, 3.0)):
        grid.step(torch.randn(R, C, generator=torch.Generator().manual_seed(seed)), rate)
        later = grid.now()
        Q_RC = later.value().to(dtype)
        assert torch.equal(round_weight(Q_RC, later.scale, None, grid.args), Q_RC)
        assert later.codes_RC.float().abs().max() <= grid.high
        changed += int((later.scale != scale).sum())
        if grid.global_scale is not None:
            codes = (later.scale * grid.global_scale).to(torch.float8_e4m3fn).float()
            assert torch.equal(codes / grid.global_scale, later.scale)
        elif grid.args.scale_dtype is not None:
            assert torch.equal(later.scale[scale > 1e-30].log2() % 1, torch.zeros_like(scale[scale > 1e-30]))
    assert changed


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_half_a_spacing_reaches_the_neighbours(bits):
    grid = args({4: "mxfp4", 6: "mxfp6", 8: "mxfp8"}[bits])
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(0)) * 2
    one = torch.ones(1, 1)
    rounded = round_weight(x, one, None, grid)
    up, down = (round_weight(x + sign * 0.5 * spacing(x, bits), one, None, grid) for sign in (1, -1))
    assert ((down <= rounded) & (rounded <= up)).all()
    assert ((down <= x) & (x <= up)).all()


def surrogate(grid: LearnedGrid, G_RC: Tensor, V: Tensor, alpha: Tensor | None, beta: Tensor, at: dict) -> Tensor:
    """sum G q in float64, one weight after the other, as the paper writes it: by the extremes of the range.

    ``at`` holds what rounding added at the point where the gradient is taken, and who was clipped there: both stay as
    they are, which is what straight-through means. It is filled at the first call.
    """
    low, high = integer_range(grid.args)
    g, total = group_columns(grid.args, C), torch.zeros((), dtype=torch.float64)
    for r in range(R):
        for k in range(-(-C // g)):
            rows = 1 if grid.args.block_structure is None else grid.args.block_structure[0]
            where = (r // rows, k) if grid.scale.ndim == 2 else (0,)
            s0 = grid.scale[where].double()
            if alpha is None:
                s, z = s0 * beta[where], torch.zeros((), dtype=torch.float64)
                s = s + at.setdefault(("s", r, k), grid.now().scale[where].double() - s)
            else:
                z0 = grid.zero_point[where].double()
                smallest, largest = (low - z0) * s0, (high - z0) * s0
                s = (beta[where] * largest - alpha[where] * smallest) / (high - low)
                z = low - alpha[where] * smallest / s
                z = z + at.setdefault(("z", r, k), z.round() - z)
            for c in range(k * g, min(C, (k + 1) * g)):
                t = grid.W_RC[r, c].double() / s
                if grid.float_bits:
                    u = at.setdefault(("spacing", r, c), spacing(t.float(), grid.float_bits).double())
                    code = t + u * V[r, c]
                    nearest = round_float_(code.float().view(1), grid.float_bits)[0].double()
                    beyond = code.abs() > high + HALF_STEP[grid.float_bits]
                    end = at.setdefault(("end", r, c), (high if code > 0 else low) if beyond else None)
                    code = code + at.setdefault(("u", r, c), nearest - code)
                    total = total + G_RC[r, c] * s * (code if end is None else end)
                    continue
                code = t + V[r, c] + z
                code = code + at.setdefault(("u", r, c), code.round() - code)
                end = at.setdefault(("end", r, c), low if code < low else high if code > high else None)
                total = total + G_RC[r, c] * s * ((code if end is None else end) - z)
    return total


@pytest.mark.parametrize("grain", [*GRAINS, *FLOATS])
def test_gradients_are_differences_of_the_surrogate(grain):
    grid = wandered(grain)
    G_RC = torch.randn(R, C, generator=torch.Generator().manual_seed(3)).double()
    point = [grid.V_RC.double(), None if grid.alpha is None else grid.alpha.double(), grid.beta.double()]
    at: dict = {}
    here = surrogate(grid, G_RC, *point, at)
    exact = 1e-5 if grid.args.scale_dtype is None else 1e-3  # those pass through bfloat16
    torch.testing.assert_close((G_RC * grid.now().value().double()).sum(), here, rtol=exact, atol=exact)
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
