"""Refinement lowers the weighted error, stays on the grid, and comes close to the best that there is."""

import itertools

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor
from torch.testing import assert_close

from lightning_compress.modifiers.gptq import refinement
from lightning_compress.modifiers.gptq.refinement import improve_codes, refine, refit_scales, weighted_error
from lightning_compress.ops.gptq_block import gptq_block_
from lightning_compress.quant.scales import expand, group_columns, integer_range, minmax

R, C = 12, 256


def grid(bits: int, symmetric: bool = True, group: int = 64) -> QuantizationArgs:
    return QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=group)


def nearest_on(args: QuantizationArgs):
    low, high = integer_range(args)

    def nearest(a: Tensor, s: Tensor, z: Tensor | None, out: Tensor) -> None:
        zero = 0 if z is None else z
        out.copy_(((a / s + zero).round().clamp(low, high) - zero) * s)

    return nearest


def problem(args: QuantizationArgs, rows: int = R, columns: int = C, seed: int = 0):
    """A weight, what rounding makes of it, its scales and zero points, and the H of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=generator)
    latent = torch.randn(4 * columns, columns // 4 + 1, generator=generator)
    X = latent @ torch.randn(columns // 4 + 1, columns, generator=generator) + torch.randn(
        4 * columns, columns, generator=generator
    )
    H = X.T @ X / len(X)
    scale, zero = minmax(W, args)
    g = group_columns(args, columns)
    wide_s = scale.repeat_interleave(g, 1)
    wide_z = None if zero is None else zero.float().repeat_interleave(g, 1)
    Q = torch.empty_like(W)
    nearest_on(args)(W, wide_s, wide_z, Q)
    return W, Q, scale, zero, H


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_step_lowers_the_error_of_every_row_and_the_result_is_on_the_grid(bits, symmetric):
    args = grid(bits, symmetric)
    W, Q, scale, zero, H = problem(args)
    error = weighted_error(W, Q, H)

    refitted, new_scale = refit_scales(W, Q, scale, args, H, torch.float32)
    after_refit = weighted_error(W, refitted, H)
    assert (after_refit <= error * (1 + 1e-5)).all()
    codes = improve_codes(W, Q, scale, zero, args, H, torch.float32)
    after_codes = weighted_error(W, codes, H)
    assert (after_codes <= error * (1 + 1e-5)).all()
    assert after_codes.sum() < 0.8 * error.sum()
    both, both_scale, both_error = refine(W, Q, scale, zero, args, H, torch.float32)
    assert weighted_error(W, both, H).sum() < 0.8 * after_refit.sum()
    assert torch.equal(both_error, weighted_error(W, both, H))

    for found, s in ((refitted, new_scale), (codes, scale), (both, both_scale)):
        low, high = integer_range(args)
        z = 0 if zero is None else zero.float().repeat_interleave(64, 1)
        code = found / s.repeat_interleave(64, 1) + z
        assert_close(code, code.round(), rtol=0, atol=1e-4)
        assert code.min() > low - 0.5
        assert code.max() < high + 0.5


def test_coordinate_descent_is_the_plain_loop():
    args = grid(3)
    W, Q, scale, zero, H = problem(args)
    expected = Q.clone().double()
    low, high = integer_range(args)
    for _ in range(2):
        for j in range(C):
            P_j = (W.double() - expected) @ H[:, j].double()
            t = expected[:, j] + P_j / H[j, j].double()
            s = scale[:, j // 64].double()
            expected[:, j] = (t / s).round().clamp(low, high) * s
    found = improve_codes(W, Q, scale, zero, args, H, torch.float32)
    assert (found.double() - expected).abs().lt(1e-5).float().mean() > 0.99  # ties fall either way in float32
    error = weighted_error(W.double(), expected, H.double())
    assert_close(weighted_error(W, found, H).double(), error, rtol=0.02, atol=0)


def test_a_sweep_calls_the_op_once_for_128_columns(monkeypatch):
    args, calls = grid(4), []
    W, Q, scale, zero, H = problem(args, columns=320)
    monkeypatch.setattr(refinement, "gptq_block_", lambda *block: calls.append(block) or gptq_block_(*block))
    improve_codes(W, Q, scale, zero, args, H, torch.float32, sweeps=2)
    assert [len(block.A_bR) for block, _ in calls] == [128, 128, 64] * 2


def test_scales_of_given_codes_are_found_again():
    args = grid(4)
    W, Q, scale, _, H = problem(args)
    codes = (Q / scale.repeat_interleave(64, 1)).round()
    planted = scale * (0.8 + 0.4 * torch.rand(scale.shape, generator=torch.Generator().manual_seed(3)))
    W = codes * planted.repeat_interleave(64, 1)
    _, found = refit_scales(W, Q, scale, args, H, torch.float32, sweeps=60)
    assert_close(found, planted, rtol=1e-4, atol=0)


def test_close_to_the_best_of_all_codes():
    """Six columns of 2 bits: all 4096 codes of a row can be tried."""
    args = grid(2, group=6)
    low, high = (int(v) for v in integer_range(args))
    every = torch.tensor(list(itertools.product(range(low, high + 1), repeat=6))).float()
    rounded, improved = [], []
    for seed in range(20):
        W, Q, scale, zero, H = problem(args, rows=4, columns=6, seed=seed)
        found = improve_codes(W, Q, scale, zero, args, H, torch.float32)
        for r in range(4):
            best = weighted_error(W[r].expand(len(every), -1), every * scale[r], H).min()
            rounded.append(float(weighted_error(W[r : r + 1], Q[r : r + 1], H) / best))
            improved.append(float(weighted_error(W[r : r + 1], found[r : r + 1], H) / best))
    assert min(improved) >= 1 - 1e-4
    assert sum(improved) / len(improved) < 0.5 * (1 + sum(rounded) / len(rounded))


def test_zeros_that_are_kept_stay_zero():
    args = grid(4)
    W, Q, scale, zero, H = problem(args)
    keep = torch.arange(C).remainder(4).lt(2).expand(R, -1)
    W, Q = W * keep, Q * keep
    found, _, _ = refine(W, Q, scale, zero, args, H, torch.float32, keep)
    assert (found[~keep] == 0).all()
    assert (weighted_error(W, found, H) <= weighted_error(W, Q, H)).all()


def test_scales_hold_in_the_dtype_that_stores_them():
    args = grid(3)
    W, Q, scale, zero, H = problem(args)
    scale = scale.bfloat16().float()
    _, found, _ = refine(W, Q, scale, zero, args, H, torch.bfloat16)
    assert torch.equal(found, found.bfloat16().float())
    assert not torch.equal(found, expand(scale, R, args))


def test_other_grids_are_refused():
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="channel")
    W = torch.ones(2, 4)
    with pytest.raises(ValueError, match="expected integers with a scale for each row, got float per channel"):
        refine(W, W, torch.ones(2, 1), None, args, torch.eye(4), torch.float32)
