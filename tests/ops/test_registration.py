"""Ops made from their parts: schemas, results without data, gradients, and when the dispatcher is skipped."""

import pytest
import torch
from torch.testing import assert_close

from lightning_compress.ops.registration import product_op, skips_dispatcher

HALF = torch.tensor(0.5)


@pytest.fixture(scope="module", params=[True, False], ids=["packed", "plain"])
def op(request):
    """x (W s)^T scale; a packed W has a column too many, so that K is needed to undo it."""
    packed = request.param

    def dense(rows, scale, *rest):
        K, dtype = rest if packed else (rows.shape[1], *rest)
        return (rows[:, :K] * (1 if scale is None else scale)).to(dtype)

    def forward(x, rows, scale, factor):
        return x @ dense(rows, scale, *([x.shape[-1]] if packed else []), x.dtype).t() * factor

    name = f"test_product_{'packed' if packed else 'plain'}"
    return (
        packed,
        name,
        product_op(name, "Tensor rows, Tensor? scale", forward, dense, options="float factor", packed=packed),
    )


@pytest.mark.parametrize("scale", [None, HALF], ids=str)
def test_a_product_and_its_gradient_are_those_of_torch(op, scale):
    packed, name, function = op
    rows = torch.randn(5, 8 + packed, generator=torch.Generator().manual_seed(0))
    x, other = (torch.randn(2, 3, 8, requires_grad=True) for _ in range(2))
    torch.library.opcheck(getattr(torch.ops.lightning_compress, name), (x, rows, scale, 1.0))
    other.data.copy_(x.data)
    expected = other @ (rows[:, :8] * (1 if scale is None else scale)).t()
    assert_close(function(x, rows, scale, 1.0), expected)
    gradient = torch.randn_like(expected)
    function(x, rows, scale, 1.0).backward(gradient)
    expected.backward(gradient)
    assert_close(x.grad, other.grad)


def test_schemas_name_the_weight_and_k_where_it_does_not_follow(op):
    packed, name, _ = op
    schemas = [getattr(torch.ops.lightning_compress, f"{name}{end}").default._schema for end in ("", "_backward")]
    assert [str(schema).partition("::")[2] for schema in schemas] == [
        f"{name}(Tensor x, Tensor rows, Tensor? scale, float factor) -> Tensor",
        f"{name}_backward(Tensor gradient, Tensor rows, Tensor? scale{', SymInt K' if packed else ''}) -> Tensor",
    ]


def test_the_dispatcher_is_skipped_where_no_gradient_is_wanted_and_nothing_wraps_the_tensor():
    x = torch.zeros(1)
    assert skips_dispatcher(x)
    assert not skips_dispatcher(torch.nn.Parameter(x))
    x.requires_grad_()
    assert not skips_dispatcher(x)
    with torch.no_grad():
        assert skips_dispatcher(x)
    assert torch.compile(lambda x: x + skips_dispatcher(x), backend="eager", fullgraph=True)(torch.zeros(1)) == 0
