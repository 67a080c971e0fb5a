"""The op on a CPU: against brute force, against the search of quant/scales.py, its messages, and its registration."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from lightning_compress.ops.gptq_block.grid import LARGEST, round_float_
from lightning_compress.ops.group_quant.reference import codes, qparams
from lightning_compress.ops.scale_search import scale_search, scale_sweep
from lightning_compress.quant.scales import search

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(5, 96, 32), (3, 70, 70), (2, 1056, 1056), (2, 24, 8), (40, 128, 64)]  # N, K, columns of a scale
GRIDS = {  # bits, symmetric, FP8, p
    "int4": (4, True, False, 2.0),
    "int4-asymmetric": (4, False, False, 2.0),
    "int3-by-power": (3, True, False, 2.4),
    "int2-asymmetric-by-power": (2, False, False, 2.4),
    "int8": (8, True, False, 2.0),
    "fp8": (8, True, True, 2.0),
}
FORMATS = {"nvfp4": (4, 16, True), "mxfp4": (4, 32, False), "mxfp6": (6, 32, False), "mxfp8": (8, 32, False)}


def operands(N, K, group, dtype):
    """Heavy tails, a group of zeros, groups of one sign, and an importance that ranges over three orders."""
    generator = torch.Generator().manual_seed(N * K)
    W = torch.randn(N, K, generator=generator) * (1 + torch.rand(N, K, generator=generator) ** 8 * 4) * 0.02
    W[0, :group] = 0
    W[1, :group] = W[1, :group].abs()
    W[1, -group:] = -W[1, -group:].abs()
    W[-1, 3] = 0.5
    return W.to(dtype), torch.randn(K, generator=generator).mul(1.5).exp()


def losses(W, scale, zero, h, bits, float8, power):
    """sum_j h_j |w_j - w^_j|^p of each group, [N, G], float64."""
    q = codes(W, scale, zero, bits, float8).unflatten(1, (scale.shape[1], -1)).double()
    q = q if zero is None else q - zero[:, :, None]
    e = q * scale[:, :, None].double() - W.double().view(q.shape)
    return (e.abs().pow(power) * h.view(1, *q.shape[1:])).sum(2)


@pytest.mark.parametrize("name", GRIDS)
def test_it_loses_less_than_extremes_and_little_more_than_the_best_of_many_factors(name):
    (bits, symmetric, float8, power), (W, h) = GRIDS[name], operands(40, 128, 64, torch.float32)
    scale, zero = qparams(W, 64, bits, symmetric, float8)
    found = losses(W, *scale_search(W, h, 64, bits, symmetric, float8, power), h, bits, float8, power)
    assert (found <= losses(W, scale, zero, h, bits, float8, power) * (1 + 1e-5)).all()
    if bits == 8:  # the walk ends at 0.93
        return
    tried = [losses(W, scale * f, zero, h, bits, float8, power) for f in torch.linspace(0.1, 1.2, 200).tolist()]
    assert found.sum() < 1.03 * torch.stack(tried).amin(0).sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K", "group"), SHAPES)
def test_results_are_those_of_the_search_by_pieces(N, K, group, dtype):
    W, h = operands(N, K, group, dtype)
    lines = {"strategy": "channel"} if group == K else {"strategy": "group", "group_size": group}
    for bits, symmetric, float8, power in GRIDS.values():
        args = QuantizationArgs(num_bits=bits, symmetric=symmetric, type="float" if float8 else "int", **lines)
        scale, zero = scale_search(W, h, group, bits, symmetric, float8, power)
        expected = search(W, args, h, power)
        assert torch.equal(scale, expected[0])
        assert (zero is expected[1] is None) or torch.equal(zero, expected[1])


def storable(name, dtype, power=2.0):
    """Arguments of scale_sweep for a format, the scales being those of the extremes."""
    bits, group, e4m3 = FORMATS[name]
    W, h = operands(6, 96, group, dtype)
    most = W.float().unflatten(1, (-1, group)).abs().amax(2).clamp(min=1e-4) / LARGEST[bits]
    if not e4m3:
        return W, most.log2().ceil().exp2(), h, bits, None, power
    global_scale = 448 / most.max().view(1)
    return W, (most * global_scale).to(torch.float8_e4m3fn).float() / global_scale, h, bits, global_scale, power


@pytest.mark.parametrize("name", FORMATS)
def test_the_sweep_takes_the_best_scale_that_can_be_stored(name):
    """Every scale of the format is tried: that with the least loss is close to that of the extremes."""
    W, scale, h, bits, global_scale, power = storable(name, torch.float32)
    codes = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = torch.exp2(torch.arange(-30.0, 5)) if global_scale is None else codes / global_scale

    def lost(s):
        w = W.unflatten(1, (scale.shape[1], -1)).double()
        s = s[:, :, None].double()
        q = round_float_((w / s).flatten(), bits).view_as(w)
        return ((q * s - w).square() * h.view(1, *w.shape[1:])).sum(2)

    found = lost(scale_sweep(W, scale, h, bits, global_scale, power))
    best = torch.stack([lost(s.expand_as(scale)) for s in every]).amin(0)
    assert (found <= lost(scale) * (1 + 1e-5)).all()
    assert (found <= best * (1 + 1e-5)).float().mean() >= 0.9


@pytest.mark.parametrize("symmetric", [True, False])
def test_op_is_registered_soundly(symmetric):
    arguments = torch.randn(3, 64), torch.ones(64), 32, 4, symmetric, False, 2.0
    torch.library.opcheck(torch.ops.lightning_compress.scale_search, arguments)
    torch.library.opcheck(
        torch.ops.lightning_compress.scale_sweep, storable("mxfp4" if symmetric else "nvfp4", torch.float32)
    )


@pytest.mark.parametrize(
    ("W", "h", "options", "message"),
    [
        (torch.zeros(2, 8).double(), torch.ones(8), {}, r"W \[N, K\] in float16, .*64 \(2, 8\)"),
        (torch.zeros(2, 8), torch.ones(4), {}, r"one importance for each of 8 columns, .* got torch.float32 \(4,\)"),
        (torch.zeros(2, 8), torch.ones(8).half(), {}, "got torch.float16"),
        (torch.zeros(2, 8), torch.ones(8), {"bits": 9}, "expected 2 to 8 bits, got 9"),
        (torch.zeros(2, 8), torch.ones(8), {"group": 3}, "groups of 3 columns do not divide K=8"),
        (torch.zeros(2, 8), torch.ones(8), {"float8": True}, "FP8 has 8 bits and no zero point, got bits=4"),
    ],
)
def test_what_does_not_fit_is_refused(W, h, options, message):
    with pytest.raises(ValueError, match=message):
        scale_search(W, h, **({"group": 8, "bits": 4} | options))


def test_a_sweep_that_does_not_fit_is_refused():
    W, h = torch.zeros(2, 32), torch.ones(32)
    with pytest.raises(ValueError, match=r"expected 4, 6 or 8 bits and float32 scales of 2 rows, got 5 bits"):
        scale_sweep(W, torch.ones(2, 1), h, 5)
    with pytest.raises(ValueError, match=r"scales of 2 rows, got 4 bits and torch.float32 \(3, 1\)"):
        scale_sweep(W, torch.ones(3, 1), h, 4)
