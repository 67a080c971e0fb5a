"""Hidden states in pairs, through projections where widths differ."""

import copy

import torch
from torch import nn

from lightning_compress.core import Lifecycle, State
from lightning_compress.modifiers.distillation.divergence import hidden_distance
from lightning_compress.modifiers.distillation.modifier import DistillationModifier
from tests.support.training_loop import network, train


def test_hidden_states_of_other_widths_go_through_a_projection_that_learns_and_resumes():
    torch.manual_seed(3)
    teacher = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 8))

    def build():
        return DistillationModifier(teacher=teacher, divergence=None, hidden={"0": "0"}, projection_lr=0.05, weight=0.5)

    torch.manual_seed(0)
    model, modifier = network(), build()
    lifecycle = train(model, [modifier], 30)
    x = torch.randn(64, 16)
    weight = modifier._hidden.projections.weights["0"]
    learned = hidden_distance(model[0](x) @ weight.T, teacher[0](x)).mean()
    fresh = hidden_distance(nn.Linear(32, 48, bias=False)(model[0](x)), teacher[0](x)).mean()
    assert learned < 0.7 * fresh
    assert list(model.state_dict()) == list(network().state_dict())

    resumed, again = copy.deepcopy(model), build()
    second = Lifecycle([again])
    second.initialize(State(model=resumed))
    second.load_state_dict(copy.deepcopy(lifecycle.state_dict()))
    train(resumed, [], 31, first=30, lifecycle=second)
    train(model, [], 31, first=30, lifecycle=lifecycle)
    assert torch.equal(again._hidden.projections.weights["0"], modifier._hidden.projections.weights["0"])
    for ours, theirs in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
