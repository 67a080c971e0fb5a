import math

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor
from torch.testing import assert_close

from lightning_compress.ops.scale_search import reference
from lightning_compress.ops.scale_search.reference import LOWEST
from lightning_compress.quant import scales
from lightning_compress.quant.fake_quant import round_weight
from lightning_compress.quant.scales import expand, integer_range, minmax, search
from tests.support.fake_cuda import fake_cuda


def grid(
    bits: int = 4, group: int | None = 16, symmetric: bool = True, strategy: str | None = None
) -> QuantizationArgs:
    return QuantizationArgs(num_bits=bits, group_size=group, symmetric=symmetric, strategy=strategy)


ALL = [
    grid(bits, group, symmetric, strategy)
    for bits in range(2, 9)
    for symmetric in (True, False)
    for group, strategy in ((16, None), (None, "channel"), (None, "tensor"))
]


def name(args: QuantizationArgs) -> str:
    return f"{args.num_bits} bits {args.strategy} {'sym' if args.symmetric else 'asym'}"


def weight(rows: int = 12, columns: int = 64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * (1 + torch.rand(rows, 1, generator=generator))


def by_definition(W_RC: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """Scale and zero point by the formulas of the format, group by group."""
    R, C = W_RC.shape
    blocks = {
        "group": W_RC.view(R, -1, args.group_size or 1),
        "channel": W_RC.view(R, 1, C),
        "tensor": W_RC.view(1, 1, -1),
    }
    block = blocks[args.strategy]
    low, high = block.amin(-1).clamp(max=0), block.amax(-1).clamp(min=0)
    levels = 2**args.num_bits - 1
    if args.symmetric:
        return torch.maximum(-low, high) / (levels / 2), torch.zeros_like(low)
    scale = (high - low) / levels
    return scale, (-(2 ** (args.num_bits - 1)) - low / scale).round()


@pytest.mark.parametrize("args", ALL, ids=name)
def test_minmax_by_its_definition_and_by_compressed_tensors(args):
    W_RC = weight()
    scale, zero = minmax(W_RC, args)
    expected_scale, expected_zero = by_definition(W_RC, args)
    assert torch.equal(scale.flatten(), expected_scale.flatten())
    assert (zero is None) == args.symmetric
    if zero is not None:
        assert zero.dtype == torch.int8
        assert torch.equal(zero.float().flatten(), expected_zero.flatten())
    shape = {"group": (12, 4), "channel": (12, 1), "tensor": (1,)}[args.strategy]
    assert scale.shape == shape
    if args.strategy == "channel":
        theirs = calculate_qparams(W_RC.amin(1, keepdim=True), W_RC.amax(1, keepdim=True), args)
        assert torch.equal(scale, theirs[0])


def test_int4_divides_by_seven_and_a_half_and_int8_by_127_and_a_half():
    W_RC = torch.tensor([[15.0, -3.0, 0.0, 1.0]])
    assert minmax(W_RC, grid(4, 4))[0].item() == 2.0
    assert minmax(W_RC, grid(8, 4))[0].item() == pytest.approx(15 / 127.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("find", [minmax, search])
def test_scales_are_in_the_dtype_that_stores_them(find, dtype):
    assert find(weight().to(dtype), grid())[0].dtype == dtype


def test_zero_stays_representable():
    """A group that lies on one side of zero still has zero on its grid."""
    W_RC = weight().abs() + 5
    for args in (grid(4, 16, symmetric=False), grid(4, 16)):
        scale, zero = minmax(W_RC, args)
        assert torch.equal(round_weight(torch.zeros(12, 64), scale, zero, args), torch.zeros(12, 64))


@pytest.mark.parametrize("find", [minmax, search])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_of_zeros_stays_zero(find, symmetric):
    W_RC, args = weight(), grid(4, 16, symmetric)
    W_RC[3, 16:32] = 0
    scale, zero = find(W_RC, args)
    assert (scale > 0).all()
    assert scale.isfinite().all()
    assert torch.equal(round_weight(W_RC, scale, zero, args)[3, 16:32], torch.zeros(16))


def errors(W_RC: Tensor, scale: Tensor, zero: Tensor | None, args: QuantizationArgs, h: Tensor, p: float) -> Tensor:
    """sum_j h_j |e_j|^p of each group, [R, G] (per tensor: [1])."""
    E = (round_weight(W_RC, scale, zero, args) - W_RC).abs().pow(p) * h
    return {
        "group": E.view(len(E), -1, args.group_size or 1).sum(-1),
        "channel": E.sum(1, keepdim=True),
        "tensor": E.sum()[None],
    }[args.strategy]


@pytest.mark.parametrize("power", [2.0, 2.4])
@pytest.mark.parametrize("args", ALL, ids=name)
def test_search_is_never_worse_than_minmax_in_any_group(args, power):
    W_RC, h = weight(), torch.rand(64, generator=torch.Generator().manual_seed(1)) ** 4
    found, plain = search(W_RC, args, h, power), minmax(W_RC, args)
    ours, theirs = errors(W_RC, *found, args, h, power), errors(W_RC, *plain, args, h, power)
    assert (ours <= theirs * (1 + 1e-4) + 1e-9).all()
    if args.num_bits <= 4:
        assert ours.sum() < 0.95 * theirs.sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_comes_close_to_a_dense_grid(bits):
    args, W_RC, h = grid(bits, 64), weight(64), torch.rand(64, generator=torch.Generator().manual_seed(1)) ** 3
    scale, _ = minmax(W_RC, args)
    dense = torch.stack([errors(W_RC, scale * f, None, args, h, 2) for f in torch.linspace(0.05, 1.6, 600)]).amin(0)
    ours = errors(W_RC, *search(W_RC, args, h), args, h, 2)
    assert ours.sum() < 1.02 * dense.sum()


def test_heavy_tails_are_followed_below_the_usual_factors():
    """One weight is sixty times the others, and its input next to nothing: the grid shrinks further than usual."""
    W_RC, h = weight(1, 16), torch.ones(16)
    W_RC[0, 0], h[0] = 60.0, 1e-9
    assert search(W_RC, grid(), h)[0] < 0.8 * LOWEST[4] * minmax(W_RC, grid())[0]


def test_importance_decides_what_is_clipped():
    """The outlier is kept where its input is large, and clipped where its input is next to nothing."""
    W_RC, args = weight(1, 16), grid(3)
    W_RC[0, 5] = 12.0
    heavy, light = torch.ones(16), torch.ones(16)
    heavy[5], light[5] = 1e3, 1e-3
    kept, clipped = (round_weight(W_RC, *search(W_RC, args, h), args)[0, 5].item() for h in (heavy, light))
    assert abs(kept - 12) < 1
    assert clipped < 6


def test_a_grid_that_fits_is_kept_to_the_bit():
    """Asymmetric codes that use both ends: extremes give the scale back, and no search may move it."""
    codes = torch.randint(-8, 8, (6, 32))
    codes[:, 0::16], codes[:, 1::16] = -8, 7
    args = grid(4, 16, symmetric=False)
    W_RC = (codes + 3).float() * 0.125
    for found in (minmax(W_RC, args), search(W_RC, args), search(W_RC, args, torch.rand(32), 2.4)):
        assert torch.equal(round_weight(W_RC, *found, args), W_RC)


def test_search_finds_a_symmetric_grid_that_minmax_misses():
    codes = torch.randint(-8, 8, (6, 32), generator=torch.Generator().manual_seed(0))
    codes[:, 0::16] = -8  # max|w| / 7.5 is off by 8 / 7.5
    W_RC = codes * 0.1
    assert_close(search(W_RC, grid())[0], torch.full((6, 2), 0.1))


def test_chunks_change_nothing(monkeypatch):
    W_RC, h = weight(40), torch.rand(64)
    for args in (grid(3), grid(3, None, strategy="channel"), grid(3, None, False, "tensor")):
        whole = search(W_RC, args, h)[0]
        with monkeypatch.context() as patch:
            patch.setattr(scales, "CHUNK", 7 * 16)
            assert_close(search(W_RC, args, h)[0], whole, rtol=1e-3, atol=0)


def test_fp8_grids():
    args = QuantizationArgs(num_bits=8, type="float", strategy="channel")
    W_RC = weight()
    scale, zero = minmax(W_RC, args)
    assert_close(scale[:, 0], W_RC.abs().amax(1) / 448)
    assert zero is None
    assert integer_range(args) == (-448, 448)
    h = torch.ones(64)
    found, plain = (errors(W_RC, s, None, args, h, 2).sum() for s in (search(W_RC, args)[0], scale))
    assert found <= plain


def test_expand_gives_rows():
    assert expand(torch.ones(1), 5, grid(4)).shape == (5, 1)
    assert expand(torch.ones(5, 3), 5, grid(4)).shape == (5, 3)
    assert math.isclose(integer_range(grid(2))[0], -2)


@pytest.mark.parametrize("args", [grid(3, 16, False), grid(4, None, strategy="channel")], ids=name)
def test_on_cuda_one_kernel_searches(args, monkeypatch):
    W_RC, h, calls = weight(), torch.rand(64), []
    expected = search(W_RC, args, h, 2.4)

    def kernel(*arguments):
        calls.append(arguments)
        return reference.scale_search(*arguments)

    monkeypatch.setattr(scales, "kernel_runs", lambda *_: True)
    monkeypatch.setattr(scales, "scale_search", kernel)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    found = search(W_RC, args, h, 2.4)
    assert len(calls) == 1
    assert torch.equal(found[0], expected[0])
    assert found[1] is expected[1] is None or torch.equal(found[1], expected[1])


FP8_BLOCKS = QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[16, 16])
NVFP4, MXFP4 = (preset_name_to_scheme(f"{name}A16", ["Linear"]).weights for name in ("NVFP4", "MXFP4"))
# grid, g, whether errors are weighed by the whole H of g columns, launches on CUDA
COSTS = {
    "groups": (grid(4, 16), 16, False, 1),
    "rows": (grid(8, None, strategy="channel"), 64, False, 1),
    "blocks": (FP8_BLOCKS, 16, False, 5),
    "one scale": (grid(8, None, strategy="tensor"), 64, False, 180),
    "NVFP4": (NVFP4, 16, False, 42),
    "MXFP4": (MXFP4, 32, False, 36),
    "groups, whole H": (grid(4, 16), 16, True, 600),
    "rows, whole H": (grid(8, None, strategy="channel"), 64, True, 550),
    "blocks, whole H": (FP8_BLOCKS, 16, True, 640),
    "one scale, whole H": (grid(8, None, strategy="tensor"), 64, True, 860),
    "NVFP4, whole H": (NVFP4, 16, True, 340),
    "MXFP4, whole H": (MXFP4, 32, True, 97),
}


@pytest.mark.parametrize("case", COSTS)
def test_launches_on_cuda_do_not_grow_with_the_weight(case):
    """And scales are those of the CPU. Bounds are what was counted, and a tenth more where torch searches."""
    args, g, whole, most = COSTS[case]
    for R, repeats in ((32, 1), (120, 3)):
        C = 64 if case.startswith(("rows", "one")) else 64 * repeats
        W_RC, h_C = weight(R, C), torch.rand(C, generator=torch.Generator().manual_seed(1))
        x_GNg = torch.randn(C // g, 50, g, generator=torch.Generator().manual_seed(2))
        weighing = {"H_Ggg": x_GNg.transpose(1, 2) @ x_GNg} if whole else {"importance_C": h_C}
        expected, _ = search(W_RC, args, **weighing)
        with fake_cuda() as gpu, torch.no_grad():
            on_gpu = {name: value.to("cuda:0") for name, value in weighing.items()}
            W_RC = W_RC.to("cuda:0")
            gpu.reset()
            scale, _ = search(W_RC, args, **on_gpu)
            assert gpu.launches.total() <= most, gpu.launches.most_common(4)
            assert gpu.syncs.total() <= 12
        assert_close(scale.cpu(), expected, rtol=1e-6, atol=0)
