"""Sparsity on a schedule: arguments, single layers, structures."""

import pytest
from torch import nn

from lightning_compress.core import Lifecycle, State
from lightning_compress.modifiers.magnitude import MagnitudePruningModifier
from tests.support.training_loop import network, train


def sparsity(module: nn.Module) -> float:
    return (module.weight == 0).float().mean().item()


def test_single_layers_may_have_their_own_sparsity():
    model = network()
    train(model, [MagnitudePruningModifier(start=0, end=1, final_sparsity=0.5, layer_sparsity={"re:2": 0.75})], 2)
    assert (sparsity(model[0]), sparsity(model[2])) == (0.5, 0.75)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"final_sparsity": 1.5}, "final_sparsity=1.5: Input should be less than 1"),
        ({"init_sparsity": -0.5}, "init_sparsity=-0.5: Input should be greater than or equal to 0"),
        ({"layer_sparsity": {"0": 1.0}}, "layer_sparsity.0=1.0: Input should be less than 1"),
        ({"init_sparsity": 0.6, "final_sparsity": 0.5}, "less than init_sparsity=0.6; sparsity only grows"),
        ({"mask_structure": "2:4", "final_sparsity": 0.7}, "has sparsity 0.5, but 0.7 was asked for"),
        ({"mask_structure": "3:2"}, "expected 0 < N < M"),
        ({"start": 0, "end": 4, "update": 9}, "update=9.0 is larger than the window from 0.0 to 4.0"),
        ({"start": 4, "end": 2}, "end=2.0 must lie after start=4.0"),
        ({"scope": "global", "mask_structure": "channel"}, "ranks single weights over all targets"),
        ({"schedule": "cubik"}, "schedule"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MagnitudePruningModifier(**arguments)


def test_a_width_that_the_pattern_does_not_divide_is_refused_before_training():
    modifier = MagnitudePruningModifier(mask_structure="2:4", targets=["0"])
    with pytest.raises(ValueError, match=r"does not fit: 0 \(2:4 does not divide 10 columns"):
        Lifecycle([modifier]).initialize(State(model=nn.Sequential(nn.Linear(10, 4))))
