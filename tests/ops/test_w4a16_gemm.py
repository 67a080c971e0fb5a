"""The op and its layout against the packing of compressed-tensors and a float64 product."""

import importlib.util

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from torch.testing import assert_close

from lightning_compress.ops import w4a16_gemm as w4a16_gemm_module
from lightning_compress.ops.w4a16_gemm import dequantize, from_planes, grid_rows, reference, to_planes, w4a16_gemm

SHAPES = [(1, 64, 1), (3, 40, 1), (17, 192, 6), (24, 200, 1), (33, 256, 2), (5, 96, 3), (7, 48, 3)]  # N, K, G


def weight(N, K, G, symmetric, dtype=torch.float32):
    """Packed by compressed-tensors: words, scales, packed zero points; and W in float64."""
    random = torch.Generator().manual_seed(N * K)
    codes = torch.randint(-8, 8, (N, K), generator=random, dtype=torch.int8)
    zero = torch.zeros(N, G, dtype=torch.int8) if symmetric else torch.randint(-8, 8, (N, G), generator=random).char()
    scale = (torch.rand(N, G, generator=random) * 0.02 + 0.001).to(dtype)
    W = (codes - zero.repeat_interleave(K // G, 1)).double() * scale.double().repeat_interleave(K // G, 1)
    return pack_to_int32(codes, 4), scale, None if symmetric else pack_to_int32(zero, 4, packed_dim=0), W


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("N", "K", "G"), SHAPES)
def test_dequantize_reads_what_compressed_tensors_packed(N, K, G, symmetric):
    packed, scale, zero, W = weight(N, K, G, symmetric)
    assert torch.equal(reference.unpack(packed, K) - 8, unpack_from_int32(packed, 4, torch.Size((N, K))))
    assert torch.equal(reference.pack(reference.unpack(packed, K)), packed)
    assert torch.equal(dequantize(packed, scale, zero, K, torch.float64), W)
    assert torch.equal(
        dequantize(packed, scale.bfloat16(), zero, K).double(),
        (W / scale.double().repeat_interleave(K // G, 1))
        .round()
        .float()
        .mul(scale.bfloat16().float().repeat_interleave(K // G, 1))
        .bfloat16()
        .double(),
    )


@pytest.mark.parametrize(("N", "K", "G"), SHAPES)
def test_planes_are_a_bijection_that_follows_its_rule(N, K, G):
    packed = torch.randint(-(2**31), 2**31, (N, -(-K // 8)), dtype=torch.int32)
    planes = to_planes(packed)
    assert planes.shape == (N, -(-K // 128) * 32)
    assert torch.equal(from_planes(planes, K), packed)
    codes = reference.unpack(packed, K)
    for k in range(0, K, 7):
        b, j, c = k // 128, k % 128 // 32, k % 32
        assert torch.equal((planes[:, 32 * b + c].int() >> 4 * j) & 15, codes[:, k].int())


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("N", "K", "G"), SHAPES)
def test_product_equals_float64(N, K, G, dtype, symmetric):
    packed, scale, zero, W = weight(N, K, G, symmetric)
    x = torch.randn(2, 3, K).to(dtype)
    y = w4a16_gemm(x, to_planes(packed), *grid_rows(scale, zero))
    assert y.dtype == dtype
    error = (y.double() - x.double() @ W.t()).norm() / (x.double() @ W.t()).norm()
    assert error < {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert_close(reference.gemm(x, packed, scale, zero), x.double() @ W.t(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradient_goes_to_x(symmetric):
    packed, scale, zero, W = weight(17, 192, 6, symmetric)
    x = torch.randn(4, 192, requires_grad=True)
    gradient = torch.randn(4, 17)
    w4a16_gemm(x, to_planes(packed), *grid_rows(scale, zero)).backward(gradient)
    assert_close(x.grad.double(), gradient.double() @ W, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_op_is_registered_soundly(symmetric):
    packed, scale, zero, _ = weight(5, 96, 3, symmetric)
    arguments = (torch.randn(2, 96, requires_grad=True), to_planes(packed), *grid_rows(scale, zero))
    torch.library.opcheck(torch.ops.lightning_compress.w4a16_gemm, arguments)


def test_compiles_and_exports_whole():
    packed, scale, zero, W = weight(5, 96, 3, False)
    planes, (scale_GN, zero_GN) = to_planes(packed), grid_rows(scale, zero)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return w4a16_gemm(x, planes, scale_GN, zero_GN) * 2

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
        ({"x": torch.zeros(2, 200)}, "K=200 columns, a row of the weight has 32 words, which hold 1 to 128;"),
        ({"x": torch.zeros(2, 97)}, "3 groups do not divide K=97 columns"),
        ({"x": torch.zeros(2, 96, device="meta")}, "x is on meta, the weight on cpu"),
        ({"planes_NP": torch.zeros(5, 32)}, "expected int16 planes and a floating scale, got torch.float32"),
        ({"scale_GN": torch.ones(3, 4)}, r"scale \[G, N\], got \(2, 96\), \(5, 32\) and \(3, 4\)"),
        ({"scale_GN": torch.ones(5, 3).t()}, "must be contiguous"),
        ({"zero_GN": torch.zeros(3, 5)}, r"int8 zero points of the scale's shape \(3, 5\), got torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {"x": torch.zeros(2, 96), "planes_NP": torch.zeros(5, 32).short(), "scale_GN": torch.ones(3, 5)}
    with pytest.raises(ValueError, match=message):
        w4a16_gemm(**(arguments | change))


def test_what_the_kernel_cannot_run_is_said(monkeypatch):
    x = torch.zeros(2, 96)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="dequantized for every call, without a fused kernel: Triton is not installed"):
        assert not w4a16_gemm_module._kernel_runs(x, 32, 3)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    with pytest.warns(UserWarning, match="T4 is older than compute capability 8.0"):
        assert not w4a16_gemm_module._kernel_runs(x, 32, 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.warns(UserWarning, match="the group size 48 is not a multiple of 32"):
        assert not w4a16_gemm_module._kernel_runs(x, 48, 2)
    assert w4a16_gemm_module._kernel_runs(x, 48, 1)
