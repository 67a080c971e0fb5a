"""The kernel against float64 in Triton's interpreter, on the CPU: shapes that fit no tile, memory full of NaN.

bf16 is interpreted through float32, and its rounding is not that of a GPU. Needs the extra ``kernels`` and
TRITON_INTERPRET=1 before Triton is imported (make test-kernels does both).
"""

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: make test-kernels", allow_module_level=True)

from lightning_compress.ops.w4a16_gemm import dequantize, grid_rows, kernel, to_planes
from lightning_compress.ops.w4a16_gemm.launch import W4Launch, rule
from tests.ops.test_w4a16_gemm import weight

pytestmark = pytest.mark.usefixtures("poisoned")

TOLERANCE = {torch.float32: 3e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SHAPES = [(1, 17, 192, 6), (17, 65, 256, 2), (3, 33, 200, 1), (5, 1, 96, 1), (2, 40, 256, 4), (33, 7, 128, 1)]


def check(x, N, G, symmetric, launch):
    K = x.shape[1]
    packed, scale, zero, W = weight(N, K, G, symmetric)
    y = kernel.gemm(x, to_planes(packed), *grid_rows(scale, zero), launch=launch)
    expected = x.double() @ W.t()
    assert y.dtype == x.dtype
    assert ((y.double() - expected).norm() / expected.norm()) < TOLERANCE[x.dtype]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("M", "N", "K", "G"), SHAPES)
def test_equals_float64(M, N, K, G, dtype, symmetric):
    x = torch.randn(M, K).to(dtype)
    for scale_sums in (True, False):
        check(x, N, G, symmetric, W4Launch(16, 64, 1, 4, 3, scale_sums))


@pytest.mark.parametrize("split", [2, 4])
def test_parts_of_k_add_up(split):
    check(torch.randn(5, 256), 17, 8, False, W4Launch(16, 64, split, 4, 3, True))  # 4 parts of 2 blocks: two are empty


def test_parts_are_added_in_order_and_counters_end_at_zero(monkeypatch):
    M, N, K, splits = 17, 65, 512, 4
    packed, scale, _, _ = weight(N, K, 4, True)
    weights, counters = (to_planes(packed), *grid_rows(scale, None)), torch.zeros(4, dtype=torch.int32)
    launch, x = W4Launch(16, 64, splits, 4, 3, True), torch.randn(M, K)
    written = torch.empty(splits, M, N, dtype=torch.float32)
    monkeypatch.setattr(kernel, "workspace", lambda *_: (written, counters))
    y = kernel.gemm(x, *weights, launch)
    assert torch.equal(y, ((written[0] + written[1]) + written[2]) + written[3])
    for part, columns in zip(written, torch.arange(K).split(128), strict=True):
        one = torch.zeros_like(x).index_copy_(1, columns, x[:, columns])
        monkeypatch.setattr(kernel, "workspace", lambda *_: (None, None))
        torch.testing.assert_close(part, kernel.gemm(one, *weights, W4Launch(16, 64, 1, 4, 3, True)))
    assert counters.tolist() == [0] * 4  # 2 x 2 tiles: the next launch begins as this one did


def test_rows_of_x_may_lie_apart():
    check(torch.randn(6, 300)[::2, :192], 17, 6, True, W4Launch(16, 64, 1, 4, 3, True))
    check(torch.randn(192, 5).t(), 17, 6, True, W4Launch(16, 64, 1, 4, 3, True))


def test_no_tokens():
    packed, scale, zero, _ = weight(17, 192, 6, False)
    assert kernel.gemm(torch.randn(0, 192), to_planes(packed), *grid_rows(scale, zero)).shape == (0, 17)


def test_the_rule_gives_every_processor_a_tile():
    for M in (1, 16, 33, 64, 65, 1000):
        launch = rule(M, 4096, 4096, torch.bfloat16, processors=132)
        assert launch.split * -(-4096 // launch.block_n) * -(-M // launch.block_m) >= (500 if M <= 16 else 128)
        assert launch.block_m >= min(M, 128)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("N", "K", "G"), [(17, 192, 6), (65, 256, 2), (33, 200, 1), (3, 144, 3), (130, 96, 8)])
def test_dequantizes_to_the_bits_of_the_reference(N, K, G, dtype, symmetric):
    packed, scale, zero, _ = weight(N, K, G, symmetric, torch.bfloat16)
    scale_GN, zero_GN = grid_rows(scale, zero)
    W = kernel.dense(to_planes(packed), scale_GN, zero_GN, K, dtype)
    assert torch.equal(W, dequantize(packed, scale, zero, K, dtype))
