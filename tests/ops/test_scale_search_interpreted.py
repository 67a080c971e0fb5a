"""The kernel against the reference in Triton's interpreter, on the CPU. Needs the extra ``kernels`` and
TRITON_INTERPRET=1 before Triton is imported (make test-kernels does both)."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: make test-kernels", allow_module_level=True)

from lightning_compress.ops.scale_search import kernel, reference, sweep
from tests.ops.test_scale_search import DTYPES, FORMATS, GRIDS, SHAPES, losses, operands, storable

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:divide by zero encountered"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K", "group"), SHAPES)
def test_equals_the_reference_up_to_the_order_of_sums(N, K, group, dtype):
    """Sums are in another order: last bits of a fitted scale may differ, and the zero point where losses are equal."""
    W, h = operands(N, K, group, dtype)
    for bits, symmetric, float8, power in GRIDS.values():
        scale, zero = kernel.scale_search(W, h, group, bits, symmetric, float8, power)
        expected = reference.scale_search(W, h, group, bits, symmetric, float8, power)
        same = (scale - expected[0]).abs() <= 5e-7 * scale if power == 2 else scale == expected[0]
        assert (~same).sum() <= 1  # a near tie, or a scale half way between two of 16 bits
        ours, theirs = (losses(W, *found, h, bits, float8, power) for found in ((scale, zero), expected))
        close = 1e-6 if bits <= 4 else 3e-5  # the last bit of a scale moves code 127 by that much of a step
        torch.testing.assert_close(ours[same], theirs[same], rtol=close, atol=1e-12)
        assert (ours <= theirs * (1 + 1e-3)).all()


def test_heavy_tails_are_followed_below_the_usual_factors():
    """One weight of the second row is sixty times the others, and its input next to nothing."""
    W, h = torch.randn(3, 16), torch.ones(16)
    W[1, 0], h[0] = 60.0, 1e-9
    for power in (2.0, 2.4):
        scale, _ = kernel.scale_search(W, h, 16, 4, True, False, power)
        assert scale[1] < 0.8 * reference.LOWEST[4] * W[1].abs().max() / 7.5
        torch.testing.assert_close(scale, reference.scale_search(W, h, 16, 4, True, False, power)[0])


def test_rows_may_lie_apart():
    W, h = operands(8, 96, 32, torch.float32)
    scale, _ = kernel.scale_search(W.t().contiguous().t(), h, 32, 4, True, False, 2.0)
    torch.testing.assert_close(scale, reference.scale_search(W, h, 32, 4, True, False, 2.0)[0])


@pytest.mark.parametrize("power", [2.0, 2.4])
@pytest.mark.parametrize("name", FORMATS)
def test_the_sweep_equals_the_reference(name, power):
    for dtype in DTYPES:
        arguments = storable(name, dtype, power)
        assert torch.equal(sweep.scale_sweep(*arguments), reference.scale_sweep(*arguments))
