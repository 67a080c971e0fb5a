"""Projections learn on their own, equal on all ranks, and come back from a checkpoint with AdamW's state."""

import copy

import torch
from torch.testing import assert_close

from lightning_compress.modifiers.distillation.projections import Projections

HIDDEN = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
TARGET = torch.randn(10, 6, generator=torch.Generator().manual_seed(1))


def step(projections, scale=1.0, applied=True):
    hidden = HIDDEN.clone().requires_grad_()
    distance = (projections.project("a", hidden, 6) - TARGET).square().mean()
    projections.collect(distance)
    (scale * distance).backward()  # as loss scaling would have it
    projections.before_step()
    if applied:
        projections.step()
    return distance.item(), hidden.grad


def test_they_learn_as_adamw_on_the_distance_alone():
    projections = Projections(0.05)
    projections.project("a", HIDDEN, 6)
    weight = projections.weights["a"].detach().clone().requires_grad_()
    optimizer = torch.optim.AdamW([weight], lr=0.05)
    for scale in (1.0, 1024.0, 0.5):
        found, gradient = step(projections, scale)
        distance = (HIDDEN @ weight.T - TARGET).square().mean()
        assert found == distance.item()
        assert_close(gradient, scale * 2 * (HIDDEN @ weight.T - TARGET) @ weight / 60)
        optimizer.zero_grad()
        distance.backward()
        optimizer.step()
        assert torch.equal(projections.weights["a"], weight)


def test_a_step_that_overflowed_leaves_nothing_behind():
    plain, skipping = Projections(0.05), Projections(0.05)
    step(skipping, applied=False)  # fp16 found an infinity: OPTIM_POST_STEP never came
    for projections in (plain, skipping):
        step(projections)
    assert torch.equal(plain.weights["a"], skipping.weights["a"])


def test_accumulated_batches_add_up():
    one, two = Projections(0.05), Projections(0.05)
    for projections, batches in ((one, 1), (two, 2)):
        for _ in range(batches):
            distance = (projections.project("a", HIDDEN, 6) - TARGET).square().mean()
            projections.collect(distance / batches)
        projections.step()
    assert_close(one.weights["a"], two.weights["a"])


def test_they_begin_equal_everywhere_and_leave_the_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = Projections(0.1)
    one.project("a", HIDDEN, 6)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    two = Projections(0.1)
    two.project("a", HIDDEN, 6)
    assert torch.equal(one.weights["a"], two.weights["a"])


def test_they_come_back_before_they_are_asked_for():
    whole = Projections(0.05)
    for _ in range(2):
        step(whole)
    again = Projections(0.05)
    again.load_state_dict(copy.deepcopy(whole.state_dict()))
    saved = again.state_dict()  # a checkpoint before the first batch loses nothing
    assert torch.equal(saved["weights"]["a"], whole.weights["a"])
    for projections in (whole, again):
        step(projections)
    assert torch.equal(again.weights["a"], whole.weights["a"])
    empty = Projections(0.05)
    empty.load_state_dict(Projections(0.05).state_dict())
    assert empty.weights == {}
