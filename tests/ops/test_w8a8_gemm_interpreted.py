"""The kernels against float64 in Triton's interpreter, on the CPU. Needs the extra ``kernels`` and TRITON_INTERPRET=1
before Triton is imported (make test-kernels does both)."""

import os

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: make test-kernels", allow_module_level=True)

from lightning_compress.ops.w8a8_gemm import kernel, reference
from lightning_compress.ops.w8a8_gemm.kernel import Launch, rule
from tests.ops.test_w8a8_gemm import case

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("split", [1, 2, 3])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 16), (3, 65, 200), (17, 33, 130)], ids=str)
def test_equals_float64(M, N, K, split):
    arguments = case(M, N, K)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 1e-3)):
        y = kernel.gemm(*arguments, dtype, Launch(16, 64, 64, split, 4, 3))
        assert y.dtype == dtype
        assert_close(y.double(), reference.gemm(*arguments), rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("M", "K"), [(1, 1), (5, 33), (2, 5000)], ids=str)
def test_tokens_have_the_codes_of_the_reference(M, K, dtype):
    x = torch.randn(M, K).to(dtype)
    x[-1, :1] = 0
    found, expected = kernel.quantize_tokens(x), reference.quantize_tokens(x)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_the_rule_gives_every_processor_a_tile():
    for M in (1, 16, 64, 1000):
        launch = rule(M, 4096, 4096, 132)
        assert launch.split * -(-4096 // launch.block_n) * -(-M // launch.block_m) >= 128
