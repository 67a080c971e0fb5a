"""The kernels against the reference in Triton's interpreter, on the CPU. Needs the extra ``kernels`` and
TRITON_INTERPRET=1 before Triton is imported (make test-kernels does both)."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: make test-kernels", allow_module_level=True)

from lightning_compress.ops.pack import kernel, reference
from tests.ops.test_pack import BITS, SHAPES, codes

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 600)], ids=str)
def test_equal_the_reference(shape, bits):
    given = codes(shape, bits)
    words = kernel.pack(given, bits)
    assert torch.equal(words, reference.pack(given, bits))
    assert torch.equal(kernel.unpack(words, bits, shape[1]), given)


@pytest.mark.parametrize("bits", [4, 5])
def test_rows_may_lie_apart(bits):
    given = codes((70, 9), bits).t()
    assert torch.equal(kernel.pack(given, bits), reference.pack(given, bits))


@pytest.mark.parametrize("bits", [3, 4])
def test_of_codes_out_of_range_the_low_bits_count(bits):
    given = torch.arange(-128, 128).to(torch.int8)[None]
    inside = ((given.int() + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)).char()
    assert torch.equal(kernel.pack(given, bits), reference.pack(inside, bits))
