"""The kernel against float64 in Triton's interpreter, on the CPU: shapes that fit no tile, memory full of NaN. e4m3 is
interpreted through fp16 bits, as below compute capability 8.9. Needs the extra ``kernels`` and TRITON_INTERPRET=1
before Triton is imported (make test-kernels does both)."""

import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: make test-kernels", allow_module_level=True)

from lightning_compress.ops import w4a8_gemm, w8a8_gemm
from lightning_compress.ops.w4a8_gemm import kernel, reference, to_planes
from lightning_compress.ops.w4a8_gemm.layout import codes
from lightning_compress.ops.w4a16_gemm.launch import W4Launch
from lightning_compress.ops.w8a8_gemm import KINDS
from lightning_compress.ops.w8a8_gemm.reference import quantize_tokens
from tests.ops.test_dense_products import OnCuda
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


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("N", "K", "G"), [(17, 192, 6), (65, 256, 2), (33, 200, 1), (3, 144, 3), (130, 40, 1)])
def test_codes_become_eight_bits_each(N, K, G, kind):
    values, _ = weight(N, K, G)
    planes = to_planes(values, K, G)
    unpacked = kernel.eight_bits(planes, K, G, kind)
    assert unpacked.dtype == kind
    assert torch.equal(unpacked.float() * (1 if kind == torch.int8 else 512), codes(planes, K, G).float())


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    ("G", "dtype", "limit"),
    [(1, torch.float32, 5e-7), (1, torch.float16, 1e-3), (2, torch.float16, 2e-3), (2, torch.bfloat16, 1e-2)],
    ids=str,
)
def test_many_tokens_by_other_products_equal_float64(G, dtype, limit, kind, monkeypatch):
    """One scale per row: a product of 8-bit codes; scales of groups: one of 16-bit numbers."""
    for module in (w4a8_gemm, w8a8_gemm):
        monkeypatch.setattr(module, "kernel_runs", lambda *_, **__: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=1))
    monkeypatch.setattr(kernel, "w4a8_kernel", None)  # not this way
    monkeypatch.setattr(w4a8_gemm, "DENSE_FROM", 20)
    M, N, K = 20, 17, 64
    values, scale = weight(N, K, G)
    x = torch.randn(M, K).to(dtype)
    weights = (t.as_subclass(OnCuda) for t in (to_planes(values, K, G), rows(scale)))
    y = w4a8_gemm._forward(x.as_subclass(OnCuda), *weights, kind)
    expected = reference.gemm(*quantize_tokens(x, kind), values, scale)
    assert (y.dtype, y.shape) == (dtype, (M, N))
    assert ((y.double() - expected).norm() / expected.norm()) < limit
