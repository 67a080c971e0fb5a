"""Sums of int8 products are exact; codes are the nearest."""

import pytest
import torch
from torch.testing import assert_close

from lightning_compress.ops.w8a8_gemm import _exact, quantize_tokens, reference, w8a8_gemm


def case(M, N, K):
    random = torch.Generator().manual_seed(K)
    codes, weight = (torch.randint(-128, 128, (rows, K), generator=random).char() for rows in (M, N))
    return codes, torch.rand(M, generator=random) + 0.1, weight, torch.rand(N, generator=random) * 0.01


@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 1), (3, 17, 40), (20, 24, 1032), (2, 3, 3000)])
def test_product_equals_float64(M, N, K):
    codes, scale, weight, scale_N = case(M, N, K)
    expected = reference.gemm(codes, scale, weight, scale_N)
    assert torch.equal(_exact(codes, weight), (codes.long() @ weight.long().t()).int())
    assert_close(w8a8_gemm(codes, scale, weight, scale_N, torch.float32).double(), expected, rtol=1e-6, atol=1e-9)
    assert_close(
        w8a8_gemm(codes.view(1, M, K), scale.view(1, M), weight, scale_N, torch.bfloat16).double()[0], expected,
        rtol=8e-3, atol=1e-9,
    )  # fmt: skip


def test_the_largest_sums_are_exact():
    codes = torch.full((2, 5000), -128).char()
    assert (_exact(codes, codes) == 128 * 128 * 5000).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tokens_are_within_half_a_step(dtype):
    x = torch.randn(2, 5, 33).to(dtype)
    x[1, 2] = 0
    codes, scale = quantize_tokens(x)
    assert (codes.shape, scale.shape) == (x.shape, x.shape[:-1])
    assert ((codes.double() * scale.double()[..., None] - x.double()).abs() <= 0.5001 * scale[..., None]).all()
    assert scale[1, 2] == 1
    assert_close(scale[0], x[0].float().abs().amax(-1) / 127.5)


def test_ops_are_registered_soundly():
    torch.library.opcheck(torch.ops.lightning_compress.w8a8_gemm, (*case(3, 5, 8), torch.bfloat16))
    torch.library.opcheck(torch.ops.lightning_compress.quantize_tokens, (torch.randn(3, 8),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 8)}, "expected int8 codes and float32 scales, got torch.float32"),
        ({1: torch.zeros(2).half()}, "and float32 scales, got .* torch.float16"),
        ({1: torch.zeros(3)}, r"expected codes \[..., K\], their scale \[...\], weight \[N, K\]"),
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
