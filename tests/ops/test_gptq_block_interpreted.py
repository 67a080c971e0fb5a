"""The kernel against float64 in Triton's interpreter, on the CPU. Needs the extra ``kernels`` and TRITON_INTERPRET=1
before Triton is imported (make test-kernels does both)."""

import os

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: make test-kernels", allow_module_level=True)

from lightning_compress.ops.gptq_block import Block, kernel, reference
from tests.support.gptq_block_cases import GRIDS, block


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize(("b", "R", "keep"), [(1, 1, False), (23, 17, True), (37, 5, False)], ids=str)
def test_equals_float64(b, R, keep, name):
    for zero in (False, True) if name.startswith("int") else (False,):
        A, W, U, rounding, mask = block(b, R, GRIDS[name], zero=zero, keep=keep)
        expected = reference.gptq_block(A, W, U.triu(1).nan_to_num(), rounding, mask)
        Q, D = torch.full_like(A, torch.nan), torch.full_like(A, torch.nan)
        kernel.gptq_block_(Block(A, Q, D, W, U, mask), rounding)
        for actual, exact in zip((A, Q, D), expected, strict=True):
            assert_close(actual.double(), exact, rtol=1e-5, atol=2e-6)
