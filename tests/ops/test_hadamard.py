"""The op against a dense float64 product; gradients, registration, messages."""

import pytest
import torch
from torch.testing import assert_close

from lightning_compress.ops.hadamard import _transform_op, hadamard_transform, reference


def base(m):
    return torch.randint(0, 2, (m, m), generator=torch.Generator().manual_seed(m)) * 2.0 - 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 1), (64, 1), (12, 12), (24, 12), (80, 20)])
def test_product_equals_float64(n, m, dtype):
    x, B = torch.randn(2, 3, n).to(dtype), None if m == 1 else base(m)
    y = hadamard_transform(x, B, n**-0.5)
    expected = reference.hadamard_transform(x, B, n**-0.5)
    assert (y.dtype, y.shape) == (dtype, x.shape)
    assert (y.double() - expected).norm() <= {8: 1e-14, 4: 1e-6, 2: 2e-2}[dtype.itemsize] * expected.norm()


def test_sylvesters_matrix_is_orthogonal():
    S = reference.sylvester(32)
    assert torch.equal(S @ S.t(), 32 * torch.eye(32, dtype=torch.float64))


@pytest.mark.parametrize("m", [1, 12])
def test_gradient_is_the_transposed_product(m):
    B = None if m == 1 else base(m)
    x = torch.randn(3, 8 * m, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn_like(x)
    H = reference.hadamard_transform(torch.eye(8 * m), B, 0.5)
    for function in (hadamard_transform, _transform_op):
        assert_close(torch.autograd.grad(function(x, B, 0.5), x, gradient)[0], gradient @ H.t())


def test_op_is_registered_soundly():
    arguments = (torch.randn(2, 6, requires_grad=True), base(3), 0.5)
    torch.library.opcheck(torch.ops.lightning_compress.hadamard_transform, arguments)
    compiled = torch.compile(hadamard_transform, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*arguments), hadamard_transform(*arguments))


@pytest.mark.parametrize(
    ("x", "B", "message"),
    [
        (
            torch.zeros(2, 24),
            None,
            "24 features, which is not a power of two times 1, the order of the base; .* order 3",
        ),
        (torch.zeros(2, 8), torch.ones(12, 12), "8 features, which is not a power of two times 12"),
        (torch.zeros(2, 8).int(), None, r"expected floating x \[..., n\] and a base \[m, m\], got torch.int32"),
        (torch.zeros(2, 8), torch.ones(4, 2), r"and base \(4, 2\)"),
        (torch.zeros(2, 8), torch.ones(4, 4, device="meta"), "x is on cpu and the base on meta"),
        (torch.zeros(()), None, "0 features"),
    ],
)
def test_what_does_not_fit_is_refused(x, B, message):
    with pytest.raises(ValueError, match=message):
        hadamard_transform(x, B)
