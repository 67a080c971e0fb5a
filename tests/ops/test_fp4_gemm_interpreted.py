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

from lightning_compress.ops.fp4_gemm import dequantize, kernel, to_layout
from lightning_compress.ops.fp4_gemm.layout import dense
from lightning_compress.ops.w4a16_gemm.launch import W4Launch
from tests.ops.test_fp4_gemm import exact, weight

pytestmark = pytest.mark.usefixtures("poisoned")

TOLERANCE = {torch.float32: 3e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SHAPES = [
    (1, 17, 208, "NVFP4"),
    (17, 65, 256, "NVFP4"),
    (3, 1, 16, "NVFP4"),
    (17, 65, 160, "MXFP4"),
    (3, 33, 128, "MXFP4"),
]  # M, N, K, format


def check(x, N, form, split=1):
    tensors = weight(N, x.shape[1], form)
    y = kernel.gemm(x, to_layout(*tensors), W4Launch(16, 64, split, 4, 3, False))
    expected = x.double() @ exact(*tensors).t()
    assert y.dtype == x.dtype
    assert ((y.double() - expected).norm() / expected.norm()) < TOLERANCE[x.dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("M", "N", "K", "form"), SHAPES)
def test_equals_float64(M, N, K, form, dtype):
    check(torch.randn(M, K).to(dtype), N, form)


@pytest.mark.parametrize("split", [2, 3])
def test_parts_of_k_add_up(split):
    check(torch.randn(5, 256), 17, "MXFP4", split)  # 3 parts of 2 blocks: one is empty


def test_rows_of_x_may_lie_apart():
    check(torch.randn(6, 300)[::2, :208], 17, "NVFP4")
    check(torch.randn(192, 5).t(), 17, "MXFP4")


def test_no_tokens():
    assert kernel.gemm(torch.randn(0, 208), to_layout(*weight(17, 208, "NVFP4"))).shape == (0, 17)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("N", "K", "form"), [(17, 208, "NVFP4"), (65, 256, "NVFP4"), (33, 160, "MXFP4"), (130, 128, "MXFP4")]
)
def test_dequantizes_to_the_bits_of_the_reference(N, K, form, dtype):
    tensors = weight(N, K, form)
    assert torch.equal(kernel.dense(to_layout(*tensors), K, dtype), dequantize(*tensors, dtype))


@pytest.mark.parametrize("group", [8, 24, 48, 128])
def test_dequantizes_groups_of_any_size(group):
    K = 3 * group
    packed = torch.randint(0, 256, (5, K // 2)).to(torch.uint8)
    scale = torch.randint(1, 127, (5, 3)).to(torch.uint8).view(torch.float8_e4m3fn)
    layout = to_layout(packed, scale, torch.tensor([77.0]))
    assert torch.equal(kernel.dense(layout, K, torch.float32), dense(layout, K, torch.float32))
