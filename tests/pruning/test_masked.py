"""Weights that stay zero: shapes that change under a mask, parametrizations that would fill zeros."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from lightning_compress.core import Lifecycle, State
from lightning_compress.modifiers.constant import ConstantPruningModifier
from lightning_compress.modifiers.learned_mask.modifier import LearnedMaskModifier
from lightning_compress.modifiers.magnitude import MagnitudePruningModifier
from lightning_compress.modifiers.movement import MovementPruningModifier
from tests.support.training_loop import network, train


def test_a_weight_that_is_not_a_matrix_is_refused_before_training():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU())
    for targets, name in ((["Linear", "1"], r"1 \(LayerNorm\)"), (["2"], r"2 \(ReLU\)")):
        with pytest.raises(ValueError, match=f"cannot prune {name}: expected modules with a weight"):
            Lifecycle([MagnitudePruningModifier(targets=targets)]).initialize(State(model=model))


@pytest.mark.parametrize("kind", ["magnitude", "constant"])
def test_a_weight_that_shrinks_under_its_mask_is_named(kind):
    model = network()
    modifier = MagnitudePruningModifier(start=0) if kind == "magnitude" else ConstantPruningModifier()
    lifecycle = train(model, [modifier], 2)
    model[0].weight = nn.Parameter(model[0].weight.detach()[:16])
    model[2].weight = nn.Parameter(model[2].weight.detach()[:, :16])
    model[0].bias = nn.Parameter(model[0].bias.detach()[:16])
    with pytest.raises(ValueError, match=r"mask of '0' is \(32, 16\), and its weight is \(16, 16\) now: .*structured"):
        train(model, [], 3, first=2, lifecycle=lifecycle)


class LowRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.update = nn.Parameter(torch.ones(1))

    def forward(self, weight):
        return weight + self.update


@pytest.mark.parametrize(
    ("put_on", "kind"),
    [
        (lambda linear: parametrize.register_parametrization(linear, "weight", LowRank()), "LowRank"),
        (parametrizations.weight_norm, "_WeightNorm"),
    ],
    ids=["low rank", "weight_norm"],
)
@pytest.mark.parametrize(
    "modifier",
    [
        lambda: MagnitudePruningModifier(start=0),
        lambda: ConstantPruningModifier(),
        lambda: MovementPruningModifier(start=0, end=4),
        lambda: LearnedMaskModifier(start=0, end=4),
    ],
    ids=["magnitude", "constant", "movement", "learned mask"],
)
def test_a_weight_that_a_foreign_parametrization_computes_is_refused(modifier, put_on, kind):
    """Zeros under it would be none in the weight, and the report would claim them."""
    model = network()
    put_on(model[0])
    with pytest.raises(ValueError, match=rf"cannot prune '0' \({kind}\).*merge it first"):
        Lifecycle([modifier()]).initialize(State(model=model))
