"""Convolutions that multiply codes give what the rounded inputs and weights give."""

import copy

import pytest
import torch
import torch.nn.functional as F
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import nn
from torch.testing import assert_close

from lightning_compress.ops.w8a8_gemm.cpu import is_exact
from lightning_compress.quant.observers import make_observer
from lightning_compress.quant.packed import Int8Conv2d, dequantize, multiply_codes
from lightning_compress.quant.rounding import round_module
from tests.support.packed_linears import INPUTS

pytestmark = pytest.mark.skipif(not is_exact(), reason="this CPU has no VNNI: int8 products are made dense")
GEOMETRIES = [{}, {"padding": 1}, {"padding": (2, 1), "stride": (1, 2), "bias": False}, {"padding": 2, "dilation": 2}]
EXACT = ["token", "static", "static-asymmetric"]


def quantized(inputs="static", dtype=torch.float32, **geometry):
    """A model of one quantized convolution, 5 channels to 7."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(5, 7, 3, dtype=dtype, **geometry)).eval()
    args = QuantizationArgs(num_bits=8, **INPUTS[inputs])
    weights = QuantizationArgs(num_bits=8, strategy="channel")
    scheme = QuantizationScheme(targets=["Conv2d"], weights=weights, input_activations=args)
    observer = None
    if not args.dynamic:
        observer = make_observer("minmax", args, 0.0)
        observer.update(torch.rand(64, dtype=dtype) * 3 - 1)
    round_module("0", model[0], scheme, "minmax", observer)
    return model


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("inputs", EXACT)
def test_products_of_codes_are_those_of_rounded_values(inputs, geometry):
    model = quantized(inputs, **geometry)
    x = torch.rand(8, 5, 60, 60) * 4 - 1.5  # some beyond the static range
    with torch.no_grad():
        expected = model(x)
        assert multiply_codes(model) == ["0"]
        y = model(x)
        assert set(model[0]._ways.values()) == {"codes"}
        assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert y.is_contiguous()  # so that view works as before
        assert_close(model(x.to(memory_format=torch.channels_last)), expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_computed_and_returned_in_bfloat16():
    model = quantized(dtype=torch.bfloat16)
    x = torch.rand(3, 5, 9, 8).bfloat16()
    with torch.no_grad():
        expected = model(x)
        multiply_codes(model)
        assert_close(model(x), expected, rtol=2e-2, atol=2e-2)
    assert model[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("inputs", EXACT)
def test_calls_with_gradient_and_single_images_are_dense_and_rounded(inputs):
    model = quantized(inputs)
    reference = copy.deepcopy(model)
    multiply_codes(model)
    x, image = torch.rand(3, 5, 9, 8, requires_grad=True), torch.rand(5, 9, 8)
    assert torch.equal(model(x), reference(x))
    model(x).sum().backward()
    assert model[0].weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert torch.equal(model(image), reference(image))


def test_a_changed_weight_is_used_by_the_next_call():
    model = quantized()
    multiply_codes(model)
    x = torch.rand(3, 5, 9, 8)
    with torch.no_grad():
        first, bias = model(x), model[0].bias[:, None, None]
        model[0].weight.mul_(-1)
        steps = torch.full_like(first, 1e-4) + (first - bias).abs().max() / 100  # code 127 has no opposite below -128
        assert ((model(x) - bias + (first - bias)).abs() < steps).all()


def test_fastest_computes_small_convolutions_densely_with_clipped_inputs():
    model = quantized("static-asymmetric")
    record = model[0]._lightning_compress_quantized
    multiply_codes(model, fastest=True)
    x = torch.rand(1, 5, 9, 8) * 8 - 4
    zero = record.input_zero_point.float()
    clipped = ((x / record.input_scale + zero).clamp(-128, 127) - zero) * record.input_scale
    with torch.no_grad():
        assert_close(model(x), F.conv2d(clipped, model[0].weight, model[0].bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "odd", [{"padding_mode": "reflect", "padding": 1}, {"padding": "same"}, {"inputs": "token-asymmetric"}], ids=str
)
def test_convolutions_that_onednn_computes_otherwise_stay_as_they_are(odd):
    model = quantized(**odd)
    assert multiply_codes(model) == []
    assert type(model[0]) is nn.Conv2d


def test_dequantize_makes_a_plain_convolution_again():
    model = quantized()
    multiply_codes(model)
    assert isinstance(copy.deepcopy(model)[0], Int8Conv2d)
    dequantize(model)
    assert type(model[0]) is nn.Conv2d
    x = torch.rand(2, 5, 9, 8)
    assert torch.equal(model(x), F.conv2d(x, model[0].weight, model[0].bias))


@pytest.mark.parametrize("inputs", EXACT)
def test_in_inference_mode_on_another_device_and_traced(inputs):
    with torch.inference_mode():
        model = quantized(inputs)
        x = torch.rand(8, 5, 60, 60)
        expected = model(x)
        multiply_codes(model)
        assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    model = quantized(inputs)
    with torch.no_grad():
        expected = model(x)
        multiply_codes(model)
        model(x)
        assert_close(torch.jit.trace(model, x)(x), expected, rtol=1e-5, atol=1e-5)
        elsewhere = copy.deepcopy(model)
        elsewhere[0]._ways = dict(model[0]._ways)
        assert elsewhere.to("meta")(x.to("meta")).shape == expected.shape
