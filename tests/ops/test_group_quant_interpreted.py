"""The kernel, bit for bit, in Triton's interpreter, on the CPU. Needs the extra ``kernels`` and TRITON_INTERPRET=1
before Triton is imported (make test-kernels does both). The kernel rounds to bf16 by itself there."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: make test-kernels", allow_module_level=True)

from lightning_compress.ops.group_quant import kernel, reference
from lightning_compress.ops.pack import reference as pack_reference
from tests.ops.test_group_quant import DTYPES, SHAPES, weight

pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.filterwarnings("ignore:invalid value encountered")]


def check(W, group, bits, symmetric, float8, packed):
    scale, zero = reference.qparams(W, group, bits, symmetric, float8)
    codes = reference.codes(W, scale, zero, bits, float8)
    expected = pack_reference.pack(codes.char(), bits) if packed else reference.values(codes, scale, zero)
    result = kernel.group_quant(W, group, bits, symmetric, float8, packed)
    assert torch.equal(result[0], expected)
    assert torch.equal(result[1], scale)
    assert (result[2] is zero is None) or torch.equal(result[2], zero)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K", "group"), SHAPES)
def test_equals_the_reference(N, K, group, dtype):
    W = weight(N, K, group, dtype)
    W[0, 0] *= dtype != torch.bfloat16  # subnormal bf16 is interpreted wrongly
    for bits, symmetric in ((4, True), (4, False), (8, False), (8, True), (3, False)):
        if group % 32 == 0 or group == K:
            check(W, group, bits, symmetric, False, True)
        check(W, group, bits, symmetric, False, False)
    check(W, group, 8, True, True, False)


def test_rows_may_lie_apart():
    check(weight(64, 6, 6, torch.float32).t(), 32, 4, True, False, True)
