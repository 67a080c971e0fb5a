"""The kernel against a dense float64 product in Triton's interpreter, on the CPU. Needs the extra ``kernels`` and
TRITON_INTERPRET=1 before Triton is imported (make test-kernels does both)."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: make test-kernels", allow_module_level=True)

from lightning_compress.ops.hadamard import kernel, reference

pytestmark = pytest.mark.usefixtures("poisoned")

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def check(x, base=None, scale=1.0):
    y = kernel.transform(x, base, scale)
    expected = reference.hadamard_transform(x, base, scale)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    assert (y.double() - expected).norm() / expected.norm() < TOLERANCE[x.dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("R", "n"), [(1, 16), (300, 16), (33, 64), (5, 128), (7, 256), (3, 512), (1, 1024), (1, 4096)])
def test_powers_of_two(R, n, dtype):
    check(torch.randn(R, n).to(dtype), scale=n**-0.5)


@pytest.mark.parametrize("n", [2048, 8192])
def test_digits_of_every_power(n):
    check(torch.randn(2, n))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("m", "P"), [(12, 16), (20, 64), (28, 32)])
def test_with_a_base(m, P, dtype):
    base = torch.randint(0, 2, (m, m)) * 2.0 - 1  # any matrix: what is tested is the product
    check(torch.randn(2, 3, m * P).to(dtype), base, (m * P) ** -0.5)


def test_what_does_not_fit_a_tile(monkeypatch):
    monkeypatch.setattr(kernel, "TILE", 64)
    check(torch.randn(3, 256))
    check(torch.randn(3, 3 * 256), torch.randint(0, 2, (3, 3)) * 2.0 - 1)
    check(torch.randn(3, 80 * 16), torch.randint(0, 2, (80, 80)) * 2.0 - 1)


def test_rows_may_lie_apart():
    check(torch.randn(6, 40)[::2, :32])
