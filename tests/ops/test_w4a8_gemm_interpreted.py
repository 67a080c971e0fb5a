"""The kernel against float64 in Triton's interpreter, on the CPU: shapes that fit no tile, memory full of NaN. e4m3 is
interpreted through fp16 bits, as below compute capability 8.9. Needs the extra ``kernels`` and TRITON_INTERPRET=1
before Triton is imported (make test-kernels does both)."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: make test-kernels", allow_module_level=True)

from lightning_compress.ops.w4a8_gemm import kernel, reference, to_planes
from lightning_compress.ops.w4a16_gemm.launch import W4Launch
from lightning_compress.ops.w8a8_gemm import KINDS
from lightning_compress.ops.w8a8_gemm.reference import quantize_tokens
from tests.ops.test_w4a8_gemm import rows, weight

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = [(1, 17, 192, 6), (17, 65, 256, 2), (3, 33, 200, 1), (5, 1, 192, 3), (2, 40, 192, 1), (33, 7, 160, 5)]


def check(M, N, K, G, kind, dtype=torch.float32, split=1):
    values, scale = weight(N, K, G)
    tokens = quantize_tokens(torch.randn(M, K), kind)
    y = kernel.gemm(*tokens, to_planes(values, K, G), rows(scale), dtype, W4Launch(16, 64, split, 4, 3, True))
    expected = reference.gemm(*tokens, values, scale)
    assert y.dtype == dtype
    assert ((y.double() - expected).norm() / expected.norm()) < (1e-3 if dtype == torch.float16 else 5e-7)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("M", "N", "K", "G"), SHAPES)
def test_equals_float64(M, N, K, G, kind):
    check(M, N, K, G, kind)


@pytest.mark.parametrize("split", [2, 3])
def test_parts_of_k_add_up(split):
    check(5, 17, 256, 2, torch.float8_e4m3fn, torch.float16, split)  # 3 parts of 2 blocks: one is empty


def test_no_tokens():
    values, scale = weight(17, 192, 6)
    tokens = torch.zeros(0, 192).char(), torch.zeros(0)
    assert kernel.gemm(*tokens, to_planes(values, 192, 6), rows(scale), torch.float16).shape == (0, 17)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("N", "K", "G"), [(17, 192, 6), (65, 256, 2), (33, 200, 1), (3, 144, 3), (130, 160, 5)])
def test_dequantizes_to_the_bits_of_the_reference(N, K, G, dtype):
    values, scale = weight(N, K, G)
    W = kernel.dense(to_planes(values, K, G), rows(scale), K, dtype)
    assert torch.equal(W, reference.dequantize(values, scale, K, torch.float32).to(dtype))
