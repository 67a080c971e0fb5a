"""A parametrized weight is saved and loaded under its own name."""

import copy

import torch
from torch import nn

from lightning_compress.layers.dense_keys import original_weight, parametrization_of, put_on, take_off, unparametrize


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(3.0))

    def forward(self, weight):
        return self.factor * weight


def scaled_linear():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    put_on(layer, Scaled())
    return layer


def test_keys_order_and_values_are_those_of_the_dense_layer():
    torch.manual_seed(0)
    dense, layer = nn.Linear(3, 2), scaled_linear()
    state = layer.state_dict()
    assert list(state) == ["weight", "bias"]
    assert torch.equal(state["weight"], dense.weight)
    assert torch.equal(layer.weight, 3 * dense.weight)
    layer.load_state_dict({"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
    assert torch.equal(layer.weight, torch.full((2, 3), 3.0))
    assert torch.equal(original_weight(layer), torch.ones(2, 3))
    assert isinstance(parametrization_of(layer, Scaled), Scaled)
    assert parametrization_of(dense, Scaled) is None


def test_removal_leaves_the_value_or_the_original_also_on_a_copy():
    for leave, factor in ((True, 3.0), (False, 1.0)):
        layer = copy.deepcopy(scaled_linear())
        original = original_weight(layer).clone()
        take_off(layer, Scaled, leave)
        assert type(layer) is nn.Linear
        assert list(layer._parameters) == ["weight", "bias"]
        assert torch.equal(layer.weight, factor * original)
        assert not layer._state_dict_hooks
        assert not layer._load_state_dict_pre_hooks


def test_one_of_two_parametrizations_goes_alone():
    layer = scaled_linear()
    put_on(layer, other := nn.ReLU())
    take_off(layer, Scaled, False)
    assert list(layer.parametrizations.weight.children()) == [other]
    assert torch.equal(layer.weight, original_weight(layer).relu())
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_the_parameter_stays_the_same_object():
    layer = scaled_linear()
    parameter = layer.parametrizations.weight.original
    unparametrize(layer)
    assert layer.weight is parameter
    assert type(layer) is nn.Linear
