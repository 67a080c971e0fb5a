"""The kernels against float64 in Triton's interpreter, on the CPU. Needs the extra ``kernels`` and TRITON_INTERPRET=1
before Triton is imported (make test-kernels does both)."""

import os

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: make test-kernels", allow_module_level=True)

from lightning_compress.ops.w8a8_gemm import KINDS, kernel, reference
from lightning_compress.ops.w8a8_gemm.kernel import W8Launch, rule
from lightning_compress.ops.w8a8_gemm.reference import quantize
from tests.ops.test_w8a8_gemm import case

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("split", [1, 2, 3])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 16), (3, 65, 200), (17, 33, 130)], ids=str)
def test_equals_float64(M, N, K, split, kind):
    arguments = case(M, N, K, kind)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-3)):
        y = kernel.gemm(*arguments, dtype, W8Launch(16, 64, 64, split, 4, 3))
        assert y.dtype == dtype
        assert_close(y.double(), reference.gemm(*arguments), rtol=tolerance, atol=1e-3)


def test_any_split_of_int8_gives_the_same_numbers():
    arguments = case(5, 65, 600, torch.int8)
    results = [kernel.gemm(*arguments, torch.float32, W8Launch(16, 64, 64, split, 4, 3)) for split in (1, 2, 5)]
    expected = reference.gemm(*arguments).float()
    for y in results:
        assert torch.equal(y, results[0])
    assert_close(results[0], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sums", [torch.int32, torch.float32], ids=str)
@pytest.mark.parametrize("one", [True, False])
def test_scaled_sums_are_those_of_torch(sums, one):
    sums_MN = torch.randint(-(2**20), 2**20, (3, 1500), dtype=torch.int32).to(sums)
    scale_M, scale_N = torch.rand(1 if one else 3), torch.rand(1 if one else 1500)
    for dtype in (torch.float32, torch.float16):
        expected = (sums_MN * scale_N * scale_M[:, None] / 2**20).to(dtype)
        assert torch.equal(kernel.scale_sums(sums_MN, scale_M / 2**20, scale_N, dtype), expected)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("scale", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_fixed_scale_gives_the_codes_of_the_reference(dtype, scale, kind):
    x, fixed = (torch.randn(3, 200) * 5).to(dtype), torch.tensor([0.03]).to(scale)
    codes = kernel.quantize_static(x, fixed, kind)
    assert torch.equal(codes.view(torch.int8), quantize(x, fixed, kind).view(torch.int8))


def test_all_e4m3_bits_are_worth_their_number():
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
    codes = codes[codes.float().isfinite()][None]
    one = torch.ones(1, dtype=torch.float8_e4m3fn)
    arguments = codes.t().contiguous(), torch.ones(1), one[None], torch.ones(1)
    y = kernel.gemm(*arguments, torch.float32, W8Launch(16, 64, 16, 1, 4, 3))
    assert torch.equal(y[:, 0], codes[0].float())


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("M", "K"), [(1, 1), (40, 33), (2, 5000)], ids=str)
def test_tokens_have_the_codes_of_the_reference(M, K, dtype, kind):
    x = (torch.randn(M, K) * torch.logspace(-6, 4, M)[:, None]).to(dtype)
    x[-1, :1] = 0
    result, expected = kernel.quantize_tokens(x, kind), reference.quantize_tokens(x, kind)
    assert torch.equal(result[0].view(torch.int8), expected[0].view(torch.int8))
    assert torch.equal(result[1], expected[1])


def test_nan_makes_the_scale_of_its_token_nan():
    x = torch.randn(3, 40)
    x[1, 7] = torch.nan
    assert kernel.quantize_tokens(x, torch.int8)[1].isnan().tolist() == [False, True, False]


def test_the_rule_gives_every_processor_a_tile():
    for M in (1, 16, 64, 1000):
        launch = rule(M, 4096, 4096, 132)
        assert launch.split * -(-4096 // launch.block_n) * -(-M // launch.block_m) >= 128
