"""State is plain frozen data, built by the caller."""

import dataclasses

import pytest
import torch

from lightning_compress.core import State


def test_names_of_the_reference_and_no_shared_defaults():
    model, teacher, loss = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.tensor(1.0)
    state = State(model=model, teacher_model=teacher, optimizer=[1], loss=loss, batch_data={"x": 1})
    assert state.model is model
    assert state.teacher_model is teacher
    assert state.loss is loss
    assert State().ledger is not State().ledger
    assert State().model is None
    assert State().block_name == ""
    assert not State().modules


def test_a_state_cannot_be_changed_only_copied():
    state = State(block_name="a")
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.block_name = "b"
    changed = state.but(block_name="b")
    assert (state.block_name, changed.block_name) == ("a", "b")
    assert changed.ledger is state.ledger


def test_a_modifier_adds_to_the_loss_in_place():
    weight = torch.ones(3, requires_grad=True)
    state = State(loss=(weight * 2).sum())
    state.loss.add_((weight * 5).sum())
    state.loss.backward()
    assert weight.grad.tolist() == [7, 7, 7]
