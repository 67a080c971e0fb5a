"""The op and its layout against the packing of compressed-tensors and a float64 product."""

import importlib.util

import pytest
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from torch.testing import assert_close

from lightning_compress.ops import fp4_gemm as fp4_gemm_module
from lightning_compress.ops.fp4_gemm import Layout, dequantize, fp4_gemm, reference, to_layout
from lightning_compress.ops.fp4_gemm.layout import dense

SHAPES = [
    (1, 16, "NVFP4"),
    (17, 208, "NVFP4"),
    (33, 256, "NVFP4"),
    (1, 32, "MXFP4"),
    (17, 160, "MXFP4"),
    (33, 256, "MXFP4"),
]  # N, K, format
GROUP = {"NVFP4": 16, "MXFP4": 32}
COMPRESSOR = {"NVFP4": NVFP4PackedCompressor, "MXFP4": MXFP4PackedCompressor}


def weight(N, K, form):
    """Tensors of a checkpoint, all codes among them: weight_packed, weight_scale, global scale or None."""
    random = torch.Generator().manual_seed(N * K)
    packed = torch.randint(0, 256, (N, K // 2), generator=random).to(torch.uint8)
    size = N, K // GROUP[form]
    if form == "MXFP4":
        return packed, torch.randint(110, 128, size, generator=random).to(torch.uint8), None
    scale = torch.randint(1, 127, size, generator=random).to(torch.uint8).view(torch.float8_e4m3fn)
    return packed, scale, torch.tensor([1234.5])


def exact(packed, scale, global_scale):
    return dequantize(packed, scale, global_scale, torch.float64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("N", "K", "form"), SHAPES)
def test_dequantize_reads_what_compressed_tensors_reads(N, K, form):
    packed, scale, global_scale = weight(N, K, form)
    state = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": global_scale}
    scheme = preset_name_to_scheme(form + "A16", ["Linear"])
    expected = COMPRESSOR[form].decompress({k: v for k, v in state.items() if v is not None}, scheme)["weight"]
    assert expected.dtype == torch.bfloat16
    assert torch.equal(dequantize(packed, scale, global_scale), expected)
    assert torch.equal(dense(to_layout(packed, scale, global_scale), K, torch.bfloat16), expected)


@pytest.mark.parametrize(("N", "K", "form"), SHAPES)
def test_layout_loses_nothing(N, K, form):
    packed, scale, global_scale = weight(N, K, form)
    layout = to_layout(packed, scale, global_scale)
    assert layout.planes.shape == (N, -(-K // 128) * 32)
    assert torch.equal(reference.pack(reference.unpack(packed)), packed)
    expected = dequantize(packed, scale, global_scale, torch.float32)
    assert torch.equal(dense(layout, K, torch.float32), expected)
    codes = reference.unpack(packed).int()
    for k in range(0, K, 5):  # planes follow their rule, element 3 in three pieces
        b, j, c = k // 128, k % 128 // 32, k % 32
        word = layout.planes[:, 32 * b + c].int()
        sign, size = (word >> (15 - 3 * j)) & 1, (word >> (6 - 3 * j)) & 7 if j < 3 else None
        if j == 3:
            sign, size = (word >> 14) & 1, (word >> 11 & 4) | (word >> 10 & 3)
        assert torch.equal(sign << 3 | size, codes[:, k])


def test_all_scales_of_e4m3_keep_their_value():
    scale = torch.arange(127).to(torch.uint8).view(torch.float8_e4m3fn)[:, None]  # all that are not negative
    packed = torch.full((127, 8), 0x2A).to(torch.uint8)  # -1 and 1
    W = dense(to_layout(packed, scale, torch.ones(1)), 16, torch.float32)
    assert torch.equal(W, torch.tensor([-1.0, 1.0]).repeat(127, 8) * scale.float())


def test_scales_of_two_keep_their_value_from_the_largest_down():
    scale = torch.tensor([[254, 254 - 30, 254 - 31], [1, 0, 1], [100, 90, 69]]).to(torch.uint8)
    packed = torch.full((3, 48), 0x22).to(torch.uint8)  # ones
    W = dense(to_layout(packed, scale), 96, torch.float64)[:, ::32]
    expected = 2.0 ** (scale.double() - 127)
    expected[0, 2] = expected[2, 2] = 0  # below 2^-30 of the largest
    assert torch.equal(W, expected)


def test_layouts_of_rows_may_be_put_together():
    parts = [weight(N, 64, "NVFP4") for N in (3, 5)]
    parts[1] = (*parts[1][:2], torch.tensor([77.0]))
    layouts = [to_layout(*part) for part in parts]
    joined = Layout(*(torch.cat(t, dim) for t, dim in zip(zip(*layouts, strict=True), (0, 1, 0), strict=True)))
    x = torch.randn(2, 64)
    assert_close(fp4_gemm(x, *joined), torch.cat([fp4_gemm(x, *layout) for layout in layouts], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("N", "K", "form"), SHAPES)
def test_product_equals_float64(N, K, form, dtype):
    tensors = weight(N, K, form)
    x = torch.randn(2, 3, K).to(dtype)
    y = fp4_gemm(x, *to_layout(*tensors))
    expected = x.double() @ exact(*tensors).t()
    assert y.dtype == dtype
    assert (y.double() - expected).norm() / expected.norm() < {
        torch.float32: 1e-6,
        torch.float16: 2e-3,
        torch.bfloat16: 1e-2,
    }[dtype]
    assert_close(reference.gemm(x, *tensors), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["NVFP4", "MXFP4"])
def test_gradient_goes_to_x(form):
    tensors = weight(17, 160, form)
    x = torch.randn(4, 160, requires_grad=True)
    gradient = torch.randn(4, 17)
    fp4_gemm(x, *to_layout(*tensors)).backward(gradient)
    assert_close(x.grad.double(), gradient.double() @ exact(*tensors), rtol=1e-5, atol=1e-6)


def test_op_is_registered_soundly():
    arguments = (torch.randn(2, 96, requires_grad=True), *to_layout(*weight(5, 96, "NVFP4")))
    torch.library.opcheck(torch.ops.lightning_compress.fp4_gemm, arguments)


def test_compiles_and_exports_whole():
    tensors = weight(5, 96, "MXFP4")
    layout, W = to_layout(*tensors), exact(*tensors)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return fp4_gemm(x, *layout) * 2

    x = torch.randn(4, 96, requires_grad=True)
    torch.compile(Layer(), fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert_close(x.grad.double(), 2 * W.sum(0).expand(4, -1), rtol=1e-5, atol=1e-6)
    exported = torch.export.export(Layer(), (x.detach(),), dynamic_shapes=({0: torch.export.Dim("M")},))
    more = torch.randn(9, 96)
    assert_close(exported.module()(more).double(), 2 * more.double() @ W.t(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 96).double()}, "x must be float16, bfloat16 or float32, got torch.float64"),
        ({"x": torch.zeros(2, 288)}, "K=288 columns, a row of the weight has 32 words, which hold 1 to 128;"),
        ({"x": torch.zeros(2, 97)}, "3 groups do not divide K=97 columns"),
        ({"x": torch.zeros(2, 96, device="meta")}, "x is on meta, the weight on cpu"),
        ({"planes_NP": torch.zeros(5, 32)}, "int16 planes, uint8 scales and float32 divisors, got torch.float32"),
        ({"scale_GN": torch.ones(3, 4).byte()}, r"divisor \[N\], got \(2, 96\), \(5, 32\), \(3, 4\), \(5,\)"),
        ({"scale_GN": torch.ones(5, 3).byte().t()}, "must be contiguous"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {
        "x": torch.zeros(2, 96), "planes_NP": torch.zeros(5, 32).short(), "scale_GN": torch.ones(3, 5).byte(),
        "divisor_N": torch.ones(5),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        fp4_gemm(**(arguments | change))


@pytest.mark.parametrize(
    ("packed", "scale", "global_scale", "message"),
    [
        (torch.zeros(5, 16).int(), None, None, "weight_packed uint8 and weight_scale float8_e4m3fn .* got torch.int32"),
        (None, torch.ones(5, 2), None, "uint8 .MXFP4., got torch.uint8 and torch.float32"),
        (None, torch.ones(4, 2).byte(), None, r"weight_scale \[N, G\], got \(5, 16\) and \(4, 2\)"),
        (None, torch.ones(5, 3).byte(), None, "3 groups do not divide K=32 columns"),
        (None, torch.ones(5, 2).byte(), torch.ones(1), "one global scale, of NVFP4 only, got .* beside torch.uint8"),
        (None, torch.full((5, 2), 255).byte(), None, "holds NaN or negative scales"),
        (None, -torch.ones(5, 2), None, "holds NaN or negative scales"),
    ],
)
def test_a_damaged_checkpoint_is_refused(packed, scale, global_scale, message):
    packed = torch.zeros(5, 16).byte() if packed is None else packed
    scale = torch.ones(5, 2).byte() if scale is None else scale
    if "negative" in message and scale.is_floating_point():
        scale = scale.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=message):
        to_layout(packed, scale, global_scale)


def test_what_the_kernel_cannot_run_is_said(monkeypatch):
    x = torch.zeros(2, 96)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="FP4 weights are dequantized for every call, without a fused kernel: Tri"):
        assert not fp4_gemm_module._kernel_runs(x, 32)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.warns(UserWarning, match="the group size 24 is not a multiple of 16"):
        assert not fp4_gemm_module._kernel_runs(x, 24)
    assert fp4_gemm_module._kernel_runs(x, 48)


def test_groups_without_a_kernel_have_the_reference():
    packed = torch.randint(0, 256, (5, 24)).to(torch.uint8)
    scale = torch.rand(5, 2).add(0.1).to(torch.float8_e4m3fn)  # groups of 24
    x = torch.randn(3, 48)
    y = fp4_gemm(x, *to_layout(packed, scale))
    assert_close(y.double(), reference.gemm(x, packed, scale), rtol=1e-5, atol=1e-5)
