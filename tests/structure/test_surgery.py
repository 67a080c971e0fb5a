"""The cut: the optimizer and its state shrink with the parameters."""

import copy

import pytest
import torch
from torch import nn

from lightning_compress.core import Lifecycle, State
from lightning_compress.modifiers.structured.modifier import StructuredPruningModifier
from tests.support.training_loop import train

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
}


def initialized(model, *modifiers):
    """The lifecycle at the end of set-up, as compress() and the callback begin."""
    lifecycle = Lifecycle(modifiers)
    lifecycle.initialize(State(model=model))
    return lifecycle


def perceptron(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_optimizer_goes_on_with_what_it_remembers(optimizer):
    """The small model trains exactly as the dense one whose removed neurons have no way in or out."""
    model = perceptron()
    made = OPTIMIZERS[optimizer](model.parameters())
    modifier = StructuredPruningModifier(dimension="channels", targets=["0"], ratio=0.5, start=3)
    memory = {}

    def look(step):
        if step == 3:
            memory["before"] = copy.deepcopy(made.state_dict())
            memory["weights"] = copy.deepcopy(model.state_dict())

    lifecycle = train(model, [modifier], 3, optimizer=made, after_step=look)
    train(model, [modifier], 4, first=3, optimizer=made, lifecycle=lifecycle)
    assert model[0].weight.shape == (16, 16)
    assert model[2].weight.shape == (24, 16)
    assert {id(p) for g in made.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert set(made.state) == set(model.parameters())

    dense = memory["weights"]
    score = dense["0.weight"].square().sum(1) + dense["2.weight"].square().sum(0)
    kept = score.argsort(descending=True)[:16].sort().values
    along = {0: (0, kept), 1: (0, kept), 2: (1, kept)}  # parameter -> dimension
    small = perceptron()
    small[0], small[2] = nn.Linear(16, 16), nn.Linear(16, 24)
    small.load_state_dict(
        {name: value.index_select(*along[i]) if i in along else value for i, (name, value) in enumerate(dense.items())}
    )
    other = OPTIMIZERS[optimizer](small.parameters())
    state = copy.deepcopy(memory["before"])
    for i, entry in state["state"].items():
        for key, value in entry.items():
            if torch.is_tensor(value) and value.dim() and i in along:
                entry[key] = value.index_select(*along[i])
    other.load_state_dict(state)
    train(small, [], 4, first=3, optimizer=other, lifecycle=_nothing(small))
    for name, value in small.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def _nothing(model):
    return initialized(model, StructuredPruningModifier(dimension="channels", ratio=0.5, start=99, input_shape=[16]))


def test_an_optimizer_whose_state_cannot_be_cut_is_refused():
    model = perceptron()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    modifier = StructuredPruningModifier(dimension="channels", targets=["0"], ratio=0.5, start=2)
    with pytest.raises(ValueError, match=r"Adafactor keeps '\w+' of shape .* prune at set-up"):
        train(model, [modifier], 4, optimizer=optimizer)
