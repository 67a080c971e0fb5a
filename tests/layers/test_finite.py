"""What is told from NaN and Inf: large numbers, and the -Inf of masks."""

import pytest
import torch
from torch import nn

from lightning_compress.layers.finite import is_finite, nonfinite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_numbers_are_not_taken_for_infinite_ones(dtype):
    largest = torch.full((9,), torch.finfo(dtype).max, dtype=dtype)  # their sum is not finite
    assert is_finite(largest)
    assert is_finite(torch.tensor([1, 2]))
    assert is_finite(torch.empty(0))
    for bad in (torch.nan, torch.inf, -torch.inf):
        assert not is_finite(torch.cat([largest, torch.tensor([bad], dtype=dtype)]))
    assert not is_finite(torch.tensor([torch.inf, -torch.inf]))


class Masked(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.register_buffer("mask", torch.tensor([0.0, value]))
        self.register_buffer("made_anew", torch.tensor([torch.nan]), persistent=False)
        self.register_buffer("absent", None)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_mask_may_hold_minus_infinity_and_running_statistics_may_not(value):
    model = nn.Sequential(nn.BatchNorm1d(2), Masked(value), nn.Linear(2, 2))
    model[0].running_mean[1] = value
    assert nonfinite(model) == (["0.running_mean"] if value < 0 else ["0.running_mean", "1.mask"])
    model[0].running_mean[1] = 0
    model[1].mask[1] = -torch.inf
    assert nonfinite(model) == []
    assert nonfinite(model, {"2.bias": torch.tensor([1.0, value])}) == ["2.bias"]
    assert nonfinite(model.to("meta")) == []


def test_float8_is_looked_at():
    module = nn.Linear(1, 1)
    module.weight = nn.Parameter(torch.tensor([[torch.nan]]).to(torch.float8_e4m3fn), requires_grad=False)
    assert nonfinite(module) == ["weight"]
