"""The op and its layout against the packing of compressed-tensors, its fake-quantized tokens and a float64 product."""

import importlib.util

import pytest
import torch
from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch.testing import assert_close

from lightning_compress.ops import w4a8_gemm as w4a8_gemm_module
from lightning_compress.ops.w4a8_gemm import dequantize, reference, to_planes, w4a8_gemm
from lightning_compress.ops.w4a8_gemm.layout import codes, plane_of
from lightning_compress.ops.w8a8_gemm import KINDS, quantize_tokens

E4M3 = torch.float8_e4m3fn
PRESET = {torch.int8: "W4A8", E4M3: "W4AFP8"}
SHAPES = [(1, 64, 1), (3, 40, 1), (17, 192, 6), (24, 200, 1), (33, 256, 2), (5, 192, 3), (7, 48, 3)]  # N, K, G


def weight(N, K, G, dtype=torch.float32):
    """int8 codes, all of -8 to 7 among them, and scales [N, G]."""
    random = torch.Generator().manual_seed(N * K)
    values = torch.randint(-8, 8, (N, K), generator=random, dtype=torch.int8)
    return values, (torch.rand(N, G, generator=random) * 0.02 + 0.001).to(dtype)


def rows(scale_NG):
    return scale_NG.t().contiguous()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("N", "K", "group"), [(5, 64, 32), (17, 256, 128), (3, 200, None)])
def test_dequantize_reads_what_compressed_tensors_packed(N, K, group):
    values, scale = weight(N, K, K // (group or K))
    scheme = preset_name_to_scheme("W4A8", ["Linear"])
    scheme.weights.group_size, scheme.weights.strategy = group, "group" if group else "channel"
    dense = (values.float().view(N, -1, group or K) * scale.unsqueeze(-1)).view(N, K)
    for compressor, name in ((PackedQuantizationCompressor, "weight_packed"), (IntQuantizationCompressor, "weight")):
        state = compressor.compress({"weight": dense, "weight_scale": scale}, scheme)
        expected = compressor.decompress(state, scheme)["weight"]
        assert torch.equal(dequantize(state[name], state["weight_scale"], K), expected)
        assert torch.equal(codes(to_planes(state[name], K, scale.shape[1]), K, scale.shape[1]), values)


@pytest.mark.parametrize(("N", "K", "G"), SHAPES)
def test_planes_are_a_bijection_that_follows_its_rule(N, K, G):
    values, _ = weight(N, K, G)
    planes, plane = to_planes(values, K, G), plane_of(K, G)
    assert planes.shape == (N, -(-K // (2 * plane)) * plane)
    assert torch.equal(to_planes(pack_to_int32(values, 4), K, G), planes)
    assert torch.equal(codes(planes, K, G), values)
    for k in range(0, K, 7):
        b, j, c = k // (2 * plane), k % (2 * plane) // plane, k % plane
        nibble = (planes[:, plane * b + c].int() >> 4 * j) & 15
        assert torch.equal(nibble, torch.where(values[:, k] < 0, 7 - values[:, k].int(), values[:, k].int()))


def test_half_bytes_are_e4m3_of_their_codes():
    values = torch.arange(-8, 8).int()
    nibble = torch.where(values < 0, 7 - values, values)
    bits = (nibble + (nibble >> 3) * 0x79).to(torch.uint8)
    assert torch.equal(bits.view(E4M3).float(), values * 2.0**-9)
    assert torch.equal((nibble ^ (nibble >> 3) * 0xF7).to(torch.uint8).view(torch.int8).int(), values)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("N", "K", "G"), SHAPES)
def test_product_equals_float64_of_what_compressed_tensors_quantizes(N, K, G, dtype, kind):
    values, scale = weight(N, K, G)
    x, args = torch.randn(2, 3, K).to(dtype), preset_name_to_scheme(PRESET[kind], ["Linear"]).input_activations
    y = w4a8_gemm(x, to_planes(values, K, G), rows(scale), kind)
    tokens = fake_quantize(x, *compute_dynamic_scales_and_zp(x, args, None), args).double()
    expected = tokens @ dequantize(values, scale, K, torch.float64).t()
    assert y.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert (y.double() - expected).norm() / expected.norm() < tolerance
    by_reference = reference.gemm(*quantize_tokens(x.view(6, K), kind), values, scale)
    assert (y.double().view(6, N) - by_reference).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradient_passes_the_rounding_straight(kind):
    values, scale = weight(17, 192, 6)
    x = torch.randn(4, 192, requires_grad=True)
    gradient = torch.randn(4, 17)
    w4a8_gemm(x, to_planes(values, 192, 6), rows(scale), kind).backward(gradient)
    assert_close(x.grad, gradient @ dequantize(values, scale, 192))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_op_is_registered_soundly(kind):
    values, scale = weight(5, 96, 3)
    arguments = (torch.randn(2, 96, requires_grad=True), to_planes(values, 96, 3), rows(scale), kind)
    torch.library.opcheck(torch.ops.lightning_compress.w4a8_gemm, arguments)


def test_compiles_and_exports_whole():
    values, scale = weight(5, 96, 3)
    planes, scale_GN = to_planes(values, 96, 3), rows(scale)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return w4a8_gemm(x, planes, scale_GN) * 2

    x = torch.randn(4, 96, requires_grad=True)
    torch.compile(Layer(), fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert_close(x.grad, 2 * dequantize(values, scale, 96).sum(0).expand(4, -1))
    exported = torch.export.export(Layer(), (x.detach(),), dynamic_shapes=({0: torch.export.Dim("M")},))
    more = torch.randn(9, 96)
    assert_close(exported.module()(more), 2 * w4a8_gemm(more, planes, scale_GN))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 96).double()}, "x must be float16, bfloat16 or float32, got torch.float64"),
        ({"x": torch.zeros(2, 192)}, "K=192 columns, a row of the weight has 64 bytes of 2 columns in planes of 64"),
        ({"x": torch.zeros(2, 97)}, "3 groups do not divide K=97 columns"),
        ({"x": torch.zeros(2, 96, device="meta")}, "x is on meta, the weight on cpu"),
        ({"planes_NP": torch.zeros(5, 64)}, "expected int8 planes and a floating scale, got torch.float32"),
        ({"scale_GN": torch.ones(3, 4)}, r"scale \[G, N\], got \(2, 96\), \(5, 64\) and \(3, 4\)"),
        ({"scale_GN": torch.ones(5, 3).t()}, "must be contiguous"),
        ({"kind": torch.float8_e5m2}, "expected codes of int8 or float8_e4m3fn, got torch.float8_e5m2"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {"x": torch.zeros(2, 96), "planes_NP": torch.zeros(5, 64).char(), "scale_GN": torch.ones(3, 5)}
    with pytest.raises(ValueError, match=message):
        w4a8_gemm(**(arguments | change))


@pytest.mark.parametrize(
    ("tensor", "K", "groups", "message"),
    [
        (torch.zeros(5, 12).int(), 104, 1, r"weight_packed int32 \[N, 13\] or codes int8 \[N, 104\], got torch.int32"),
        (torch.zeros(5, 96).long(), 96, 1, "got torch.int64"),
        (torch.zeros(5, 96).char(), 96, 5, "5 groups do not divide K=96 columns"),
    ],
)
def test_a_weight_that_does_not_fit_is_refused(tensor, K, groups, message):
    with pytest.raises(ValueError, match=message):
        to_planes(tensor, K, groups)


def test_what_the_kernel_cannot_run_is_said(monkeypatch):
    x = torch.zeros(2, 96)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.warns(UserWarning, match="dequantized for every call, without a fused kernel: the group size 48"):
        assert not w4a8_gemm_module._kernel_runs(x, 48, 2)
    assert w4a8_gemm_module._kernel_runs(x, 48, 1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="Triton is not installed"):
        assert not w4a8_gemm_module._kernel_runs(x, 32, 2)
