"""Normalizations are recognized by what they compute."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_compress.modifiers.rotation.norms import normalized, recognize
from tests.support.rotation_models import build


@pytest.mark.parametrize(("module", "centered", "offset"), [
    (nn.RMSNorm(8), False, 0), (nn.LayerNorm(8), True, 0), (nn.LayerNorm(8, bias=False), True, 0),
    (nn.LayerNorm(8, elementwise_affine=False), True, 0),
])  # fmt: skip
def test_norms_are_recognized(module, centered, offset):
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    norm = recognize("n", module, 8, torch.device("cpu"))
    assert norm is not None
    assert (norm.centered, norm.offset) == (centered, offset)
    assert (norm.gain is not None) == (getattr(module, "weight", None) is not None)
    assert (norm.bias is not None) == (getattr(module, "bias", None) is not None)


def test_the_norm_of_gemma_has_an_offset():
    model = build("gemma")
    norm = recognize("n", model.model.norm, 32, torch.device("cpu"))
    assert norm is not None
    assert norm.offset == 1


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return x * self.weight


@pytest.mark.parametrize("module", [Scale(), nn.Identity(), nn.Linear(8, 8), nn.PReLU(8), nn.BatchNorm1d(4).eval()])
def test_other_modules_are_not_recognized(module):
    assert recognize("n", module, 8, torch.device("cpu")) is None


def test_normalized_vectors():
    x = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    assert_close(normalized(x, centered=False), torch.tensor([[1.0, 3.0], [0.0, 0.0]]) / 5**0.5)
    assert_close(normalized(x, centered=True), torch.tensor([[-1.0, 1.0], [0.0, 0.0]]))
