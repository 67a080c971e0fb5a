"""The input of a quantized layer: which numbers share a scale, and what passes its rounding backwards."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from lightning_compress.quant.fake_quant import fake_quantize_input, round_weight
from lightning_compress.quant.input_parametrization import FakeQuantizeInput
from lightning_compress.quant.packed import PackedLinear
from lightning_compress.quant.record import saw_rows
from lightning_compress.quant.rounding import round_module
from tests.support.fake_cuda import fake_cuda

PRESETS = ["W8A8", "W8A8 asymmetric", "W4A8", "FP8_DYNAMIC", "W4AFP8", "W4A4"]
ROWS = [(6, 32), (6, 5, 32), (6, 5, 3, 32)]
IMAGES = {
    "conv2d": (lambda: nn.Conv2d(4, 8, 3), (6, 4, 7, 9)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (6, 4, 7, 9)),
    "1x1": (lambda: nn.Conv2d(4, 8, 1), (6, 4, 7, 9)),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3), (6, 4, 9)),
}


def inputs_of(name):
    args = preset_name_to_scheme(name.split()[0], ["Linear"]).input_activations
    return args.model_copy(update={"symmetric": False}) if "asymmetric" in name else args


def with_scheme(layer, name):
    scheme = preset_name_to_scheme(name.split()[0], ["Linear"])
    scheme.weights.group_size = None if scheme.weights.strategy == "channel" else 4
    scheme.input_activations = inputs_of(name)
    round_module("layer", layer, scheme, "minmax", None)
    return layer


def in_memory(layer, name):
    return with_scheme(layer, name)


def packed(layer, name):
    return PackedLinear.from_quantized(with_scheme(layer, name))


def in_training(layer, name):
    quantize = FakeQuantizeInput(inputs_of(name), 0.01, layer.weight)
    layer.register_forward_pre_hook(lambda module, x: (quantize(module, x[0]),))
    return layer


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("way", [in_memory, packed, in_training])
def test_the_answer_to_a_row_does_not_depend_on_its_neighbours(name, shape, way):
    torch.manual_seed(0)
    layer, x = way(nn.Linear(32, 8), name), torch.randn(shape)
    odd = torch.cat([x[:1], 200 * torch.randn(1, *shape[1:])])
    with torch.no_grad():
        alone = layer(x[:1])
        assert_close(layer(x)[:1], alone, rtol=1e-5, atol=1e-6)  # a code more or less would be 1e-3 and above
        assert_close(layer(odd)[:1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("way", [in_memory, in_training])
def test_the_answer_to_an_image_does_not_depend_on_its_neighbours(kind, way):
    torch.manual_seed(0)
    make, shape = IMAGES[kind]
    layer, x = way(make(), "W8A8"), torch.randn(shape)
    odd = torch.cat([x[:1], 200 * torch.randn(1, *shape[1:])])
    with torch.no_grad():
        alone = layer(x[:1])
        assert_close(layer(x)[:1], alone, rtol=1e-5, atol=1e-6)
        assert_close(layer(odd)[:1], alone, rtol=1e-5, atol=1e-6)
        assert_close(layer(x[0])[None], alone, rtol=1e-5, atol=1e-6)  # without a batch


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("name", ["W8A8", "W8A8 asymmetric", "FP8_DYNAMIC"])
def test_an_image_has_one_scale_as_a_static_scale_of_its_own_would_be(kind, name):
    """A scale per input channel would vary along the sum of the convolution, which no integer kernel can apply."""
    torch.manual_seed(0)
    make, shape = IMAGES[kind]
    x, args = torch.randn(shape), inputs_of(name)
    x[:, 0] *= 100
    whole = QuantizationArgs(**args.model_dump() | {"strategy": "tensor"})
    each = [fake_quantize(image, *compute_dynamic_scales_and_zp(image, whole, None), whole) for image in x]
    assert torch.equal(fake_quantize_input(make(), x, args, None, None), torch.stack(each))


@pytest.mark.parametrize("make", [lambda: nn.Linear(32, 8), lambda: Conv1D(8, 32)], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("name", PRESETS)
def test_rows_are_tokens_and_tokens_are_those_of_compressed_tensors(name, make):
    torch.manual_seed(0)
    x, args, module = torch.randn(6, 5, 32) * torch.randn(6, 5, 1).exp(), inputs_of(name), make()
    tokens = fake_quantize_input(module, x, args, None, None)
    assert torch.equal(tokens, fake_quantize(x, *compute_dynamic_scales_and_zp(x, args, module), args))
    assert torch.equal(fake_quantize_input(module, x.flatten(0, 1), args, None, None), tokens.flatten(0, 1))


def test_layers_whose_rows_plain_transformers_would_not_tell_apart_are_noted():
    layer = with_scheme(nn.Linear(32, 8), "W8A8")
    for x in (torch.randn(2, 5, 32), torch.randn(1, 32), torch.randn(32)):
        layer(x)
    assert not saw_rows(layer)
    layer(torch.randn(2, 32))
    assert saw_rows(layer)


def test_compressed_tensors_launches_its_kernels_on_the_device_of_the_tensor(monkeypatch):
    devices, scheme = [], preset_name_to_scheme("W8A8", ["Linear"])

    def noting(x, *args, **kwargs):
        devices.append(torch.cuda.current_device())
        return x

    monkeypatch.setattr("lightning_compress.quant.fake_quant.fake_quantize", noting)
    with fake_cuda():
        x, scale = (torch.ones(2, n, dtype=torch.float32, device="cuda:1") for n in (4, 1))
        round_weight(x, scale, None, scheme.weights)
        fake_quantize_input(nn.Linear(4, 4), x[None], scheme.input_activations, None, None)
        assert torch.cuda.current_device() == 0
    assert devices == [1, 1]
