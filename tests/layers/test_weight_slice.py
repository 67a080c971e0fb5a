"""A slice of a parameter of another module is a Linear without parameters of its own."""

import torch
from torch import nn

from lightning_compress.layers.module_weights import ModuleWeight
from lightning_compress.layers.weight_slice import owner_of


def test_the_owner_of_a_slice_is_the_module_with_the_parameter():
    home, linear = nn.GRUCell(4, 6), nn.Linear(2, 2)
    weight = ModuleWeight(home, "weight_ih", (6, 12))
    assert owner_of(weight) is home
    assert owner_of(linear) is linear
    assert weight.whole is home.weight_ih
    assert torch.equal(weight.weight, home.weight_ih[6:12])
    assert list(weight.state_dict()) == []
    weight.weight.data.zero_()
    assert (home.weight_ih[6:12] == 0).all()
    assert (home.weight_ih[:6] != 0).all()
