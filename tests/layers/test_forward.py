"""What is changed for a while is afterwards as it was."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from lightning_compress.layers.forward import eval_mode, gradients_for, patched


def test_a_patch_holds_inside_for_this_instance_alone():
    one, other, x = nn.Identity(), nn.Identity(), torch.ones(1)
    with patched(one, forward=lambda x: x + 1, extra_repr=lambda: "patched"):
        assert (one(x), other(x)) == (2, 1)
        assert repr(one) == "Identity(patched)"
    assert one(x) == 1
    assert not {"forward", "extra_repr"} & vars(one).keys()


def test_an_instance_gets_back_what_it_had_itself_also_after_an_error():
    module = nn.Identity()
    module.forward = own = lambda x: x * 3  # as accelerate does
    with pytest.raises(ZeroDivisionError), patched(module, forward=lambda x: x / 0):
        module(1)
    assert vars(module)["forward"] is own
    with patched(module, forward=lambda x: x):
        del module.forward  # whoever cleans up inside
    assert vars(module)["forward"] is own


def test_patches_nest():
    module = nn.Identity()
    with patched(module, forward=lambda x: 1):
        with patched(module, forward=lambda x: 2):
            assert module(0) == 2
        assert module(0) == 1
    assert module(0) == 0


def test_a_copy_made_afterwards_does_not_call_the_first_one():
    module = nn.Linear(1, 1)
    with patched(module, forward=lambda x: x):
        pass
    copy = deepcopy(module)
    with torch.no_grad():
        copy.weight.fill_(0)
        copy.bias.fill_(5)
    assert copy(torch.ones(1)) == 5


def test_eval_mode_gives_each_module_its_mode_back():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Dropout())).train()
    model[1][0].eval()
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, True, False, True]


def test_gradients_for_some_parameters_also_after_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].bias.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    inside = []

    def broken():
        with gradients_for(model, [model[0].bias, model[1].weight]):
            inside.extend(parameter.requires_grad for parameter in model.parameters())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken()
    assert inside == [False, True, True, False]
    assert [parameter.requires_grad for parameter in model.parameters()] == before == [True, False, True, True]
