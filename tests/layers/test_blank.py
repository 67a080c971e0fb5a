"""Blanks are like their tensors, and alone among tensors on meta pass the checks of modifiers."""

import pytest
import torch
from torch import nn

from lightning_compress.layers.blank import blank_of, is_blank, mark_blank
from lightning_compress.layers.matrix import check_weights_work


def test_a_blank_of_a_parameter_is_one():
    parameter = nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16), requires_grad=False)
    blank = blank_of(parameter)
    assert isinstance(blank, nn.Parameter)
    assert not blank.requires_grad
    assert (blank.shape, blank.dtype, blank.device.type) == (parameter.shape, parameter.dtype, "meta")
    assert is_blank(blank)
    assert not is_blank(parameter)
    assert not isinstance(blank_of(torch.ones(2)), nn.Parameter)


def test_a_module_on_meta_is_refused_unless_its_weight_is_a_blank():
    with torch.device("meta"):
        module = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="its weight is on the meta device, so it has no values"):
        check_weights_work({"x": module}, "quantize")
    mark_blank(module.weight)
    check_weights_work({"x": module}, "quantize")
