"""The kernel against the reference in Triton's interpreter, on the CPU. Needs the extra ``kernels`` and
TRITON_INTERPRET=1 before Triton is imported (make test-kernels does both)."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: make test-kernels", allow_module_level=True)

from lightning_compress.ops.mask_2of4 import kernel, reference
from tests.ops.test_mask_2of4 import ORDERS

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_order_of_four(dtype):
    score = ORDERS[~(ORDERS.isnan().any(1) & ORDERS.isinf().any(1))].to(dtype)  # NaN and Inf are alike to the kernel
    assert torch.equal(kernel.mask_2of4(score), reference.mask_2of4(score))


@pytest.mark.parametrize(("R", "C"), [(1, 4), (3, 20), (70, 132)], ids=str)
def test_equals_the_reference(R, C):
    score = torch.randn(C, R).t()
    assert torch.equal(kernel.mask_2of4(score), reference.mask_2of4(score))
