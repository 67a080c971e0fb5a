"""Steps of slices of one parameter: joined values, one step at most for each, everything back at the end."""

import pytest
import torch
from torch import nn

from lightning_compress.layers.home_parametrization import RowSlices, add_step, has_steps, remove_step, restore_home
from lightning_compress.layers.module_weights import ModuleWeight


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x):
        return x * self.factor


def test_slices_with_steps_are_joined_with_those_without():
    home = nn.MultiheadAttention(4, 2)
    dense, keys = home.in_proj_weight.detach().clone(), list(home.state_dict())
    q, v = (ModuleWeight(home, "in_proj_weight", (row, row + 4)) for row in (0, 8))
    parameter = q.whole
    add_step(q, RowSlices([4, 4, 4]), Times(2.0))
    add_step(v, RowSlices([4, 4, 4]), Times(-1.0))
    assert torch.equal(home.in_proj_weight, torch.cat([2 * dense[:4], dense[4:8], -dense[8:]]))
    assert torch.equal(q.weight, 2 * dense[:4])
    assert list(home.state_dict()) == keys
    assert torch.equal(home.state_dict()["in_proj_weight"], dense)
    with pytest.raises(ValueError, match=r"in_proj_weight of a MultiheadAttention has a Times already.*one parametr"):
        add_step(q, RowSlices([4, 4, 4]), Times(3.0))
    remove_step(q, leave_parametrized=True)
    assert has_steps(home)
    remove_step(v, leave_parametrized=False)
    assert not has_steps(home)
    restore_home(home)
    assert type(home) is nn.MultiheadAttention
    assert home.in_proj_weight is parameter
    assert torch.equal(parameter, torch.cat([2 * dense[:4], dense[4:]]))
    assert [name for name, _ in home.named_parameters()] == keys
