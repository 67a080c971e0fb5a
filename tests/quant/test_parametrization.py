"""A weight on its grid in every forward pass; what is left behind computes the same, bit for bit."""

import pytest
import torch
from compressed_tensors.quantization import preset_name_to_scheme
from torch import nn

from lightning_compress.quant.parametrization import (
    FakeQuantize,
    fake_quantize_of,
    finish,
    lift,
    lower,
    parametrize_weight,
    restore_dense,
)
from lightning_compress.quant.record import Quantized

W4A16 = preset_name_to_scheme("W4A16", ["Linear"])
W4A16.weights.group_size = 8


def fake_quantized(gradient="ste"):
    torch.manual_seed(0)
    layer = nn.Linear(16, 4)
    parametrize_weight(layer, FakeQuantize(layer, W4A16, gradient, "minmax"))
    fake_quantize_of(layer).active = True
    return layer


@pytest.mark.parametrize("gradient", ["ste", "lsq"])
def test_what_is_computed_in_training_is_what_is_left(gradient):
    layer, x = fake_quantized(gradient), torch.randn(3, 16)
    expected = layer(x)
    record = finish(layer)
    assert type(layer) is nn.Linear
    assert torch.equal(layer(x), expected)
    assert Quantized.of(layer) is record
    codes = layer.weight.unflatten(1, (2, 8)) / record.scale[..., None]
    assert torch.equal(codes.round() * record.scale[..., None], layer.weight.unflatten(1, (2, 8)))


def test_the_dense_weight_comes_back():
    torch.manual_seed(0)
    dense = nn.Linear(16, 4)
    layer = fake_quantized()
    assert not torch.equal(layer.weight, dense.weight)
    restore_dense(layer)
    assert torch.equal(layer.weight, dense.weight)
    assert fake_quantize_of(layer) is None


def test_lifted_and_lowered_again_it_is_the_same_layer():
    layer, x = fake_quantized(), torch.randn(3, 16)
    expected, parameter = layer(x), layer.parametrizations.weight.original
    lifted = lift(layer)
    assert type(layer) is nn.Linear
    assert layer.weight is parameter
    lower(layer, lifted, None)
    assert torch.equal(layer(x), expected)
    assert layer.parametrizations.weight.original is parameter


@pytest.mark.parametrize("scheme", ["NVFP4A16", "MXFP4A16"])
def test_a_learned_scale_moves_on_the_grid_of_scales_and_its_gradient_passes_that(scheme):
    torch.manual_seed(0)
    layer = nn.Linear(64, 4)
    parametrize_weight(layer, FakeQuantize(layer, preset_name_to_scheme(scheme, ["Linear"]), "lsq", "minmax"))
    fake = fake_quantize_of(layer)
    fake.active, start = True, fake.scale.clone()
    with torch.no_grad():
        fake.change.fill_(0.01)  # too little for another number of E4M3, whose spacing is 1 / 8 to 1 / 16
        assert torch.equal(fake.grid(layer.weight)[0], start)
        fake.change.fill_(0.6)
        moved, _ = fake.grid(layer.weight)
    g = fake.global_scale
    if g is None:
        assert torch.equal(moved, 2 * start)
    else:
        stored = (moved * g).to(torch.float8_e4m3fn).float()
        assert torch.equal(stored / g, moved)
        assert ((moved / start - 1.6).abs() < 0.1)[moved * g < 448].all()
    layer.weight.sum().backward()
    assert (fake.change.grad != 0).any()


def test_a_cast_of_the_model_leaves_the_scales_of_nvfp4():
    layer = nn.Linear(32, 4)
    parametrize_weight(layer, FakeQuantize(layer, preset_name_to_scheme("NVFP4A16", ["Linear"]), "lsq", "minmax"))
    fake = fake_quantize_of(layer)
    scale, g = fake.scale.clone(), fake.global_scale.clone()
    layer.to(torch.bfloat16)
    assert layer.parametrizations.weight.original.dtype == torch.bfloat16
    assert torch.equal(fake.scale, scale)
    assert torch.equal(fake.global_scale, g)
