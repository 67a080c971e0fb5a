"""Sums of int8 products are exact; codes are those of compressed-tensors' fake-quantize."""

import importlib.util

import pytest
import torch
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch.testing import assert_close

from benchmarks.op_cases.w8a8_gemm import scales_rows_on_cpu
from lightning_compress.ops import w8a8_gemm as w8a8_gemm_module
from lightning_compress.ops.w8a8_gemm import (
    KINDS,
    _by_scaled_mm,
    _exact,
    quantize_static,
    quantize_tokens,
    reference,
    w8a8_gemm,
    w8a8_linear,
)  # fmt: skip

E4M3 = torch.float8_e4m3fn
PRESET = {torch.int8: "W8A8", E4M3: "FP8_DYNAMIC"}


def case(M, N, K, kind=torch.int8):
    random = torch.Generator().manual_seed(K)
    codes, weight = (torch.randint(-128, 128, (rows, K), generator=random).char() for rows in (M, N))
    if kind == E4M3:
        codes, weight = (t.float().div(16).to(kind) for t in (codes, weight))
    return codes, torch.rand(M, generator=random) + 0.1, weight, torch.rand(N, generator=random) * 0.01


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 1), (3, 17, 40), (20, 24, 1032), (2, 3, 3000)])
def test_product_equals_float64(M, N, K, kind):
    codes, scale, weight, scale_N = case(M, N, K, kind)
    expected = reference.gemm(codes, scale, weight, scale_N)
    if kind == torch.int8:
        assert torch.equal(_exact(codes, weight), (codes.long() @ weight.long().t()).int())
    one = w8a8_gemm(codes, scale[:1], weight, scale_N[:1], torch.float32)
    assert_close(one.double(), reference.gemm(codes, scale[:1], weight, scale_N[:1]), rtol=1e-5, atol=1e-4)
    assert_close(w8a8_gemm(codes, scale, weight, scale_N, torch.float32).double(), expected, rtol=1e-5, atol=1e-4)
    assert_close(
        w8a8_gemm(codes.view(1, M, K), scale.view(1, M), weight, scale_N, torch.bfloat16).double()[0], expected,
        rtol=8e-3, atol=1e-3,
    )  # fmt: skip


def test_the_largest_sums_are_exact():
    codes = torch.full((2, 5000), -128).char()
    assert (_exact(codes, codes) == 128 * 128 * 5000).all()


def tokens(dtype):
    """Of sizes from 1e-6 to 1e4, so that codes and scales of fp16 underflow; one of zeros."""
    x = torch.randn(1, 40, 33, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 4, 40)[:, None]
    x[0, 3] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_tokens_have_the_codes_of_compressed_tensors(kind, dtype):
    x, args = tokens(dtype), preset_name_to_scheme(PRESET[kind], ["Linear"]).input_activations
    expected = fake_quantize(x, *compute_dynamic_scales_and_zp(x, args, None), args)
    codes, scale = quantize_tokens(x, kind)
    assert (codes.dtype, codes.shape, scale.shape) == (kind, x.shape, x.shape[:-1])
    assert torch.equal(codes.to(dtype) * scale.to(dtype)[..., None], expected)


@pytest.mark.parametrize("wide", [torch.float32, None], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_fixed_scale_gives_the_codes_of_compressed_tensors(dtype, wide):
    x, args = tokens(dtype), preset_name_to_scheme("FP8", ["Linear"]).input_activations
    scale = torch.tensor([0.013]).to(wide or dtype)
    expected = fake_quantize(x, scale, torch.zeros(1), args)
    assert torch.equal(quantize_static(x, scale, E4M3).to(scale.dtype) * scale, expected)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_linear_quantizes_and_multiplies(kind):
    _, _, weight, scale_N = case(1, 16, 48, kind)
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    for scale in (None, torch.tensor([0.02])):
        codes = (
            reference.quantize_tokens(x.view(10, 48), kind)
            if scale is None
            else (quantize_static(x.view(10, 48), scale, kind), scale)
        )
        expected = reference.gemm(*codes, weight, scale_N).view(2, 5, 16)
        for dtype in (torch.float32, torch.bfloat16):
            y = w8a8_linear(x.to(dtype), weight, scale_N, scale)
            assert y.dtype == dtype
            assert (y.double() - expected).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * expected.norm()


def test_gradient_passes_the_rounding_straight():
    _, _, weight, scale_N = case(1, 16, 48, E4M3)
    x = torch.randn(5, 48, requires_grad=True)
    gradient = torch.randn(5, 16)
    w8a8_linear(x, weight, scale_N).backward(gradient)
    assert_close(x.grad, gradient @ (weight.float() * scale_N[:, None]))


@pytest.mark.parametrize(("by_token", "by_row"), [(True, True), (False, False), (True, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scales_of_torchs_own_product(by_token, by_row, dtype):
    codes, scale, weight, scale_N = case(32, 48, 64, E4M3)
    arguments = codes, scale if by_token else scale[:1], weight, scale_N if by_row else scale_N[:1]
    if by_token and dtype == torch.bfloat16 and not scales_rows_on_cpu():
        pytest.skip(f"torch {torch.__version__} has no scales by row on a CPU")
    y = _by_scaled_mm(*arguments, dtype)
    assert y.dtype == dtype
    assert_close(y.double(), reference.gemm(*arguments), rtol=8e-3, atol=1e-3)


def test_compiles_and_exports_whole():
    _, _, weight, scale_N = case(1, 16, 48, E4M3)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return w8a8_linear(x, weight, scale_N) + w8a8_gemm(*quantize_tokens(x, E4M3), weight, scale_N, x.dtype)

    x = torch.randn(4, 48)
    assert_close(torch.compile(Layer(), fullgraph=True, backend="aot_eager")(x), 2 * w8a8_linear(x, weight, scale_N))
    exported = torch.export.export(Layer(), (x,), dynamic_shapes=({0: torch.export.Dim("M")},))
    more = torch.randn(9, 48)
    assert_close(exported.module()(more), 2 * w8a8_linear(more, weight, scale_N))


def test_ops_are_registered_soundly():
    ops, x = torch.ops.lightning_compress, torch.randn(3, 8, requires_grad=True)
    torch.library.opcheck(ops.w8a8_gemm, (*case(3, 5, 8), torch.bfloat16))
    torch.library.opcheck(ops.quantize_tokens, (x.detach(), torch.int8))
    torch.library.opcheck(ops.w8a8_linear, (x, *case(3, 5, 8)[2:], None))
    fake = {"test_utils": "test_faketensor"}  # the others multiply e4m3, which torch does not
    torch.library.opcheck(ops.w8a8_gemm, (*case(3, 5, 8, E4M3), torch.bfloat16), **fake)
    torch.library.opcheck(ops.quantize_tokens, (x.detach(), E4M3), **fake)
    torch.library.opcheck(ops.w8a8_linear, (x, *case(3, 5, 8, E4M3)[2:], None), **fake)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 8)}, "int8 or float8_e4m3fn codes on both sides and float32 scales, got torch.float32"),
        ({1: torch.zeros(2).half()}, "and float32 scales, got .* torch.float16"),
        ({2: torch.zeros(5, 8).to(E4M3)}, "got torch.int8 and torch.float8_e4m3fn"),
        ({1: torch.zeros(3)}, r"expected codes \[..., K\], their scale \[...\] or \[1\], weight \[N, K\]"),
        ({2: torch.zeros(5, 9).char()}, r"got \(2, 8\), \(2,\), \(5, 9\) and \(5,\)"),
        ({2: torch.zeros(8, 5).char().t()}, "the weight must be contiguous"),
        ({2: torch.zeros(5, 8, device="meta").char()}, "codes are on cpu, the weight is on meta"),
        ({4: torch.float64}, "dtype must be float16, bfloat16 or float32, got torch.float64"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = [*case(2, 5, 8), torch.bfloat16]
    for at, value in change.items():
        arguments[at] = value
    with pytest.raises(ValueError, match=message):
        w8a8_gemm(*arguments)


@pytest.mark.parametrize("x", [torch.zeros(2, 8).double(), torch.zeros(2, 0), torch.zeros(())])
def test_tokens_that_do_not_fit_are_refused(x):
    with pytest.raises(ValueError, match=r"expected x \[..., K\] in float16, bfloat16 or float32, got"):
        quantize_tokens(x)


def test_codes_and_scales_that_do_not_fit_are_refused():
    x, (_, _, weight, scale_N) = torch.zeros(2, 8), case(2, 5, 8)
    with pytest.raises(ValueError, match="expected codes of int8 or float8_e4m3fn, got torch.uint8"):
        quantize_tokens(x, torch.uint8)
    with pytest.raises(ValueError, match=r"expected one floating scale \[1\], got torch.float32 \(2,\)"):
        quantize_static(x, torch.ones(2), E4M3)
    with pytest.raises(ValueError, match=r"expected one floating scale \[1\], got torch.int64 \(1,\)"):
        w8a8_linear(x, weight, scale_N, torch.ones(1).long())
    with pytest.raises(ValueError, match=r"x \[..., K\], weight \[N, K\] and its float32 scale .* got \(2, 8\), "):
        w8a8_linear(x, weight, scale_N[:3])
    with pytest.raises(ValueError, match="x is on cpu, the weight is on meta"):
        w8a8_linear(x, weight.to("meta"), scale_N)
    with pytest.raises(ValueError, match="the weight must be contiguous"):
        w8a8_linear(x, torch.zeros(8, 5).char().t(), scale_N)


def test_nan_stays_nan():
    _, _, weight, scale_N = case(1, 16, 48, E4M3)
    x = torch.zeros(2, 48)
    x[1, 5] = torch.nan
    assert w8a8_linear(x, weight, scale_N).isnan().all(1).tolist() == [False, True]


def test_what_the_kernel_cannot_run_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="8-bit products are computed by torch, without a fused kernel: Triton is not"):
        assert not w8a8_gemm_module._kernel_runs(torch.device("cpu"))


def test_what_torchs_own_products_take(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    supported = w8a8_gemm_module._torch_multiplies
    assert [supported("cuda", torch.int8, N, 64) for N in (24, 25)] == [True, False]
    assert not supported("cuda", E4M3, 32, 64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert [supported("cuda", E4M3, N, 64) for N in (32, 24)] == [True, False]
