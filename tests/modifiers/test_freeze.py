"""What is frozen does not move by a bit; what thaws trains on."""

import pytest
import torch

from lightning_compress.core import Lifecycle, State
from lightning_compress.modifiers.freeze import FreezeModifier
from tests.support.training_loop import network, train


@pytest.mark.parametrize("build", [torch.optim.SGD, torch.optim.AdamW])
def test_parameters_stand_still_inside_the_window_only(build):
    model = network()
    options = {"lr": 0.05, "weight_decay": 0.1} | ({"momentum": 0.9} if build is torch.optim.SGD else {})
    last, moved = model[2].weight.detach().clone(), {}

    def look(step: int) -> None:
        nonlocal last
        moved[step] = not torch.equal(last, model[2].weight)
        last = model[2].weight.detach().clone()

    modifier = FreezeModifier(targets=["2"], start=3, end=6)
    train(model, [modifier], 9, optimizer=build(model.parameters(), **options), after_step=look)
    assert moved == {1: True, 2: True, 3: True, 4: False, 5: False, 6: False, 7: True, 8: True, 9: True}


def test_ignored_parts_go_on_training():
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    train(model, [FreezeModifier(targets=["Linear"], ignore=["0"])], 3)
    assert not torch.equal(before[0], model[0].weight)
    assert torch.equal(before[2], model[2].weight)


def test_an_empty_choice_is_an_error():
    with pytest.raises(ValueError, match="targets is empty"):
        Lifecycle([FreezeModifier()]).initialize(State(model=network()))
    with pytest.raises(ValueError, match="hold no parameter that trains"):
        Lifecycle([FreezeModifier(targets=["1"])]).initialize(State(model=network()))
