"""Weights that are shared, and the modifiers that would change both sides."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_compress.core import Lifecycle, State
from lightning_compress.export.load import load
from lightning_compress.export.save import save
from lightning_compress.layers.tied_weights import owners_of
from lightning_compress.modifiers.gptq.modifier import GPTQModifier
from lightning_compress.modifiers.learned_mask.modifier import LearnedMaskModifier
from lightning_compress.modifiers.magnitude import MagnitudePruningModifier
from lightning_compress.modifiers.movement import MovementPruningModifier
from lightning_compress.modifiers.quantization import QuantizationModifier
from lightning_compress.modifiers.sparsegpt import SparseGPTModifier
from lightning_compress.modifiers.wanda.modifier import WandaPruningModifier


class Tied(nn.Module):
    """An embedding and its output layer."""

    def __init__(self, how: str):
        super().__init__()
        self.table, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
        if how == "parameter":
            self.head.weight = self.table.weight
        elif how == "memory":
            self.head.weight.data = self.table.weight.data.view_as(self.head.weight)
        elif how == "part":
            self.head.weight.data = torch.cat([torch.zeros(4, 8), self.table.weight.data])[2:18]
            self.table.weight.data = self.head.weight.data[:16]

    def forward(self, x):
        return self.head(self.table(x))


MODIFIERS = [
    GPTQModifier(scheme="W8A16", group_size=-1),
    LearnedMaskModifier(start=0, end=4),
    MagnitudePruningModifier(final_sparsity=0.5),
    MovementPruningModifier(final_sparsity=0.5, start=0, end=4),
    QuantizationModifier(scheme="W8A16", group_size=-1),
    SparseGPTModifier(sparsity=0.5),
    WandaPruningModifier(sparsity=0.5),
]


@pytest.mark.parametrize("how", ["parameter", "memory"])
@pytest.mark.parametrize("modifier", MODIFIERS, ids=lambda m: m.name)
def test_what_writes_weights_refuses_a_shared_one(modifier, how):
    message = "the weight of 'head' is shared with 'table.weight', which would change with it; add 'head' to ignore"
    with pytest.raises(ValueError, match=message):
        Lifecycle([modifier.model_copy(deep=True)]).initialize(State(model=Tied(how)))


@pytest.mark.parametrize("modifier", MODIFIERS, ids=lambda m: m.name)
def test_one_that_is_not_shared_goes(modifier):
    lifecycle = Lifecycle([modifier.model_copy(deep=True)])
    lifecycle.initialize(State(model=Tied("no")))
    lifecycle.abort()


def test_memory_that_overlaps_and_memory_that_lies_side_by_side():
    both = torch.randn(8, 4)
    first, second, third = (nn.Parameter(both[start:end]) for start, end in ((0, 4), (4, 8), (3, 5)))
    model = nn.ParameterDict({"first": first, "second": second})
    assert list(owners_of(model)[id(first)]) == ["first"]
    model["third"] = third
    assert list(owners_of(model)[id(first)]) == ["first", "third"]
    assert list(owners_of(model)[id(third)]) == ["first", "second", "third"]


def test_shared_memory_is_saved_under_both_names(tmp_path):
    model, fresh = Tied("memory"), Tied("no")
    save(model, tmp_path / "out")
    load(tmp_path / "out", fresh)
    for part in (fresh.table, fresh.head):
        assert_close(part.weight, model.table.weight, rtol=0, atol=0)
    save(Tied("parameter"), tmp_path / "tied")
    load(tmp_path / "tied", Tied("parameter"))
