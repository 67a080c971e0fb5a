import pytest
import torch
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA, FP6_E2M3_DATA
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch.testing import assert_close

from lightning_compress.quant.fake_quant import round_weight
from lightning_compress.quant.formats import round_float_, stored_scale
from lightning_compress.quant.scales import expand, minmax, search

MICROSCALED = ["NVFP4A16", "MXFP4A16", "MXFP6A16", "MXFP8A16"]
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
E2M3 = [m / 8 for m in range(8)] + [(1 + m / 8) * 2**e for e in range(3) for m in range(8)]


def args_of(name):
    return preset_name_to_scheme(name, ["Linear"]).weights


def weight(rows=48, columns=256, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * torch.rand(rows, 1)


@pytest.mark.parametrize(("bits", "numbers"), [(4, E2M1), (6, E2M3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_small_floats_by_the_list_of_their_numbers(bits, numbers, dtype):
    numbers = torch.tensor(numbers, dtype=dtype)
    x = torch.cat([torch.linspace(-9, 9, 4001, dtype=dtype), (numbers[1:] + numbers[:-1]) / 2, numbers])
    found = round_float_(x.clone(), bits)
    nearest = (x.abs()[:, None] - numbers).abs().amin(1)
    assert_close((x.abs() - found.abs()).abs(), nearest, rtol=0, atol=0)
    assert set(found.abs().tolist()) == set(numbers.tolist())
    cast = FP4_E2M1_DATA.cast_to_fp4 if bits == 4 else FP6_E2M3_DATA.cast_to_fp6
    if dtype == torch.float32:  # theirs goes through float32
        assert torch.equal(found, cast(x.clone()))  # ties too


@pytest.mark.parametrize("name", MICROSCALED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scales_are_those_of_compressed_tensors(name, dtype):
    args, W = args_of(name), weight().to(dtype)
    blocks = W.float().unflatten(1, (-1, args.group_size))
    g = generate_gparam(W.float().amin(), W.float().amax()) if name == "NVFP4A16" else None
    theirs, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale=g)
    scale, zero = minmax(W, args)
    assert zero is None
    assert scale.dtype == torch.float32
    assert_close(scale if g is None else scale * g, theirs, rtol=1e-6, atol=0)
    Q = fake_quantize(W.float(), theirs, None, args, global_scale=g).to(torch.bfloat16).to(dtype)
    assert torch.equal(round_weight(W, scale, None, args), Q)
    assert torch.equal(round_weight(Q, scale, None, args), Q)


@pytest.mark.parametrize("power", [2.0, 2.4])
@pytest.mark.parametrize("name", MICROSCALED)
def test_the_search_finds_the_best_of_the_scales_that_can_be_stored(name, power):
    args, W = args_of(name), weight(16, 64)
    h = torch.rand(64, generator=torch.Generator().manual_seed(1)) ** 4

    def errors(scale):
        e = (fake_quantize(W, scale, None, args) - W).abs().pow(power) * h
        return e.unflatten(1, (-1, args.group_size)).sum(-1)

    start, _ = minmax(W, args)
    found, _ = search(W, args, h, power)
    assert (errors(found) <= errors(start)).all()
    if name == "NVFP4A16":
        g = generate_gparam(W.amin(), W.amax())
        codes = (found * g).to(torch.float8_e4m3fn)
        assert_close(codes.float() / g, found, rtol=1e-6, atol=0)
        every = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float() / g
        every = [torch.full_like(found, float(s)) for s in every]
        assert (errors(found) < errors(start)).float().mean() > 0.3
    else:
        assert torch.equal(found.log2(), found.log2().round())
        every = [start * 2.0**k for k in range(-4, 5)]
    best = torch.stack([errors(s) for s in every]).amin(0)
    assert (errors(found) <= best * (1 + 1e-5)).float().mean() > 0.97


@pytest.mark.parametrize("name", MICROSCALED)
def test_groups_of_zeros_stay_zero(name):
    args, W = args_of(name), weight(4, 64)
    W[:, :32] = 0
    for scale, _ in (minmax(W, args), search(W, args)):
        assert (scale > 0).all()
        Q = round_weight(W, scale, None, args)
        assert (Q[:, :32] == 0).all()
        assert Q.isfinite().all()


@pytest.mark.parametrize("shape", [(256, 256), (70, 200), (3, 130)], ids=str)
def test_blocks_by_a_loop_over_them(shape):
    W = weight(*shape)
    args = args_of("FP8_BLOCK")
    scale, _ = minmax(W, args)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = W[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
            assert_close(scale[i, j], block.abs().max() / 448)
    assert scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    found, _ = search(W, args, torch.rand(shape[1]))
    assert found.shape == scale.shape
    by_row = expand(scale, shape[0], args)
    assert by_row.shape == (shape[0], scale.shape[1])
    assert torch.equal(expand(by_row, shape[0], args), by_row)


def test_a_scale_that_can_be_stored_stays_and_others_go_to_the_nearest():
    g = torch.tensor([2688 / 0.37])
    codes = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(stored_scale(codes / g, args_of("NVFP4A16"), g), codes / g)
    between = (codes[1:] + codes[:-1]) / 2
    near = stored_scale(between * 1.001 / g, args_of("NVFP4A16"), g)
    assert torch.equal(near, codes[1:] / g)
    assert (
        stored_scale(torch.tensor([9.0, 1e-9]), args_of("NVFP4A16"), g).tolist()
        == (torch.tensor([448.0, 2.0**-9]) / g).tolist()
    )
    powers = torch.exp2(torch.arange(-127.0, 128.0))
    for factor, step in ((1.0, 1.0), (1.4, 1.0), (0.72, 1.0), (1.5, 2.0), (0.7, 0.5)):
        nearest = stored_scale(powers[1:-1] * factor, args_of("MXFP4A16"), None)
        assert torch.equal(nearest, powers[1:-1] * step)
