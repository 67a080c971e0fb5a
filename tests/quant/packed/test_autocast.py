"""Under autocast a packed Linear computes what a dense Linear with its weight computes."""

import pytest
import torch
from torch import nn

from lightning_compress.quant.packed import PackedLinear
from tests.support.packed_linears import COLUMNS, quantized_linear, tokens

DENSE = ["w3 g32", "w8 g32", "NVFP4A16", "MXFP4A16", "MXFP8", "FP8", "FP8_DYNAMIC", "W4A8 g64"]  # no backend on a CPU


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_bit_for_bit_as_the_dense_linear(name, given, bias):
    linear = quantized_linear(name, 48, bias=bias)
    packed, x = PackedLinear.from_quantized(linear), tokens(2, 5, COLUMNS, dtype=given)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            y, expected = packed(x), linear(x)
        assert y.dtype == dtype
        assert torch.equal(y, expected)


def test_what_a_backend_computes_is_what_it_gives_for_cast_tokens():
    packed, x = PackedLinear.from_quantized(quantized_linear("w4 g32", 48)), tokens(2, 5, COLUMNS)
    with torch.no_grad():
        expected = packed(x.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(packed(x), expected)
    assert packed.dtype == torch.float32


def test_the_gradient_has_the_dtype_of_x():
    linear = quantized_linear("w4 g32", 48)
    packed, grads = PackedLinear.from_quantized(linear), []
    for layer in (packed, linear):
        x = tokens(2, 5, COLUMNS).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.float().sin().sum().backward()
        grads.append(x.grad)
    assert grads[0].dtype == torch.float32
    assert torch.equal(*grads)


def test_float64_tokens_are_not_cast():
    packed, x = PackedLinear.from_quantized(quantized_linear("w4 g32", 48)), tokens(2, 5, COLUMNS).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(x).dtype == torch.float64


def test_compiles_under_autocast():
    torch._dynamo.reset()
    packed, x = PackedLinear.from_quantized(quantized_linear("w8 g32", 48)), tokens(2, 5, COLUMNS)
    compiled = torch.compile(nn.Sequential(packed), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                assert torch.equal(compiled(x), packed(x))
        assert compiled(x).dtype == torch.float32
