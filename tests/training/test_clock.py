"""Steps that were made."""

import math

import pytest
import torch

from lightning_compress.training.clock import StepClock


def nothing(optimizer):
    pass


def optimizers(count):
    return [torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=1.0) for _ in range(count)]


@pytest.mark.parametrize(
    ("batches", "accumulate", "epochs", "max_steps", "count", "per_epoch", "total"),
    [
        (10, 1, 3, -1, 1, 10, 30),
        (10, 4, 3, -1, 1, 3, 9),  # the last window is partial
        (10, 1, 3, 7, 1, 10, 7),
        (10, 1, -1, 40, 1, 10, 40),
        (10, 1, None, -1, 1, 10, None),
        (10, 1, 3, 30, 2, 10, 15),  # max_steps adds up both optimizers
        (math.inf, 1, 3, -1, 1, None, None),
        (math.inf, 1, 3, 12, 1, None, 12),
    ],
)
def test_lengths(batches, accumulate, epochs, max_steps, count, per_epoch, total):
    clock = StepClock()
    clock.measure(batches, accumulate, epochs, max_steps, count)
    event = clock.event()
    assert (event.steps_per_epoch, event.total_steps, event.batches_per_step) == (per_epoch, total, accumulate)


def test_each_optimizer_counts_its_own_steps():
    clock, (one, two) = StepClock(), optimizers(2)
    clock.attach([one, two], nothing, nothing)
    for optimizer in (one, two, two):
        optimizer.step()
    assert clock.steps == [1, 2]
    assert clock.global_step == 2


def test_before_and_after_a_step_is_counted():
    clock, told = StepClock(), []
    (optimizer,) = optimizers(1)
    clock.attach([optimizer], lambda o: told.append(clock.global_step), lambda o: told.append(clock.global_step))
    optimizer.step()
    assert told == [0, 1]


def test_a_grad_scaler_that_skips_does_not_count():
    clock, (optimizer,) = StepClock(), optimizers(1)
    clock.attach([optimizer], nothing, nothing)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for gradient in (1.0, math.inf, 1.0):
        optimizer.param_groups[0]["params"][0].grad = torch.tensor([gradient])
        scaler.scale(torch.ones(1))
        scaler.step(optimizer)
        scaler.update()
    assert clock.global_step == 2


def test_attaching_again_and_detaching():
    clock, (optimizer,) = StepClock(), optimizers(1)
    clock.attach([optimizer], nothing, nothing)
    clock.attach([optimizer], nothing, nothing)
    optimizer.step()
    clock.detach()
    clock.detach()
    optimizer.step()
    assert clock.steps == [1]


def test_the_counts_survive_a_checkpoint():
    clock = StepClock()
    clock.load_state_dict({"steps": [5, 3], "batches": 9})
    one, two = optimizers(2)
    clock.attach([one, two], nothing, nothing)
    two.step()
    assert clock.state_dict() == {"steps": [5, 4], "batches": 9}


def test_what_is_no_optimizer_is_named():
    class Homemade:
        def step(self):
            pass

    with pytest.raises(ValueError, match="optimizer 1 is a Homemade, expected a torch.optim.Optimizer"):
        StepClock().attach([*optimizers(1), Homemade()], nothing, nothing)
