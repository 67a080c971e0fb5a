"""A trial rounds a weight as the quantizer that it stands for."""

import copy

import pytest
import torch
from torch import nn

from lightning_compress import QuantizationModifier, compress
from lightning_compress.quant.trial_rounding import assigned, round_in_place, weight_scheme


@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("preset", ["W4A16", "W3A16", "W4A16_ASYM", "NVFP4A16", "W8A16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weight_is_that_of_rounding_to_nearest(preset, search, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 16)).to(dtype)
    other, scheme = copy.deepcopy(model), weight_scheme(preset, ["Linear"], "auto")
    size = {} if preset == "NVFP4A16" else {"group_size": "auto"}
    ledger = compress(other, QuantizationModifier(scheme=preset, scale_search=search, **size))
    schemes = assigned(model, scheme, [])
    errors = [round_in_place(model.get_submodule(name), each, search) for name, each in schemes.items()]
    assert list(schemes) == ["0", "1"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert errors == [row.error for row in ledger]
