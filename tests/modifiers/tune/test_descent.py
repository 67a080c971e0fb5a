"""The descent on a function whose minimum is known; the best epoch; what happens when nothing is gained."""

import itertools

import pytest
import torch
from torch import nn

from lightning_compress.core import State
from lightning_compress.modifiers.tune.descent import Settings, held_out_batches, tune
from lightning_compress.modifiers.tune.knobs import TensorKnob


@pytest.mark.parametrize("count", [2, 3, 4, 7, 16, 128])
@pytest.mark.parametrize("share", [0.01, 0.125, 0.5, 0.99])
def test_some_batches_are_held_out_and_some_are_left(count, share):
    numbers = held_out_batches(count, share)
    assert len(set(numbers)) == len(numbers) == min(max(1, round(share * count)), count - 1)
    assert set(numbers) < set(range(count))
    if len(numbers) > 1 and share <= 0.5:  # spread over all
        assert max(b - a for a, b in itertools.pairwise(numbers)) <= 2 * count / len(numbers)


class Quadratic:
    """Batch i asks for the vector target + noise_i; a parameter that is no knob must stay."""

    def __init__(self):
        self.model = nn.Module()
        self.model.vector = nn.Parameter(torch.tensor([1.0, -2.0, 4.0]))
        self.model.other = nn.Parameter(torch.ones(2))
        self.model.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.target = torch.tensor([1.1, -1.9, 3.8])
        self.calls = []

    def loss(self, number):
        self.calls.append((number, torch.is_grad_enabled(), self.model.other.requires_grad))
        return (self.model.vector * self.model.other.sum() / 2 - self.target - 0.001 * number).square().mean()


def settings(**changes):
    return Settings(**{"epochs": 40, "rate": 0.05, "accumulate": 1, "patience": 40, "seed": 0} | changes)


@torch.no_grad()
def run(problem, numbers, **changes):
    knobs = [TensorKnob(problem.model.vector)]
    return tune(problem.model, knobs, problem.loss, numbers, settings(**changes), State()), knobs


def test_it_descends_and_leaves_flags_and_other_parameters():
    problem = Quadratic()
    tuned, _ = run(problem, ([0, 1, 3], [2]))
    assert tuned.losses[0] == pytest.approx(float(problem.loss(2).detach()) if not tuned.best else tuned.losses[0])
    assert tuned.losses[tuned.best] < tuned.losses[0] / 100
    torch.testing.assert_close(problem.model.vector.data, problem.target + 0.0013, atol=0.02, rtol=0)
    assert problem.model.other.requires_grad
    assert not problem.model.frozen.requires_grad
    assert problem.model.vector.grad is None
    assert {other for _, grad, other in problem.calls if grad} == {False}  # only knobs have gradients
    held_out = [number for number, grad, _ in problem.calls if not grad]
    assert set(held_out) == {2}
    assert {number for number, grad, _ in problem.calls if grad} == {0, 1, 3}


def test_the_best_epoch_stays_and_patience_ends_it():
    problem = Quadratic()
    tuned, knobs = run(problem, ([0, 1], [2]), rate=0.4, patience=2, epochs=30)
    assert tuned.best == min(range(len(tuned.losses)), key=tuned.losses.__getitem__)
    assert len(tuned.losses) == 31 or len(tuned.losses) - 1 - tuned.best == 2
    assert float(problem.loss(2).detach()) == pytest.approx(tuned.losses[tuned.best])


def test_without_a_gain_every_bit_is_as_before():
    problem = Quadratic()
    before = problem.model.vector.detach().clone()
    tuned, _ = run(problem, ([0, 1], [2]), rate=1e3, patience=3)
    assert tuned.best == 0
    assert len(tuned.losses) == 4
    assert torch.equal(problem.model.vector, before)


def test_batches_of_a_step_are_averaged():
    """Adam's first step is lr in the direction of the sign: of the mean gradient, whatever most batches say."""
    pulls, seen = {0: 3.0, 1: -1.0, 2: -1.0, 9: 1.0}, []
    model = nn.Module()
    model.vector = nn.Parameter(torch.ones(1))

    def loss(number):
        seen.append((number, float(model.vector.detach())))
        return -pulls[number] * model.vector.sum()

    with torch.no_grad():
        how = settings(epochs=1, accumulate=3, rate=0.1)
        tune(model, [TensorKnob(model.vector)], loss, ([0, 1, 2], [9]), how, State())
    assert sorted(seen[1:4]) == [(0, 1.0), (1, 1.0), (2, 1.0)]  # one step after all three
    assert model.vector.item() == pytest.approx(1.1)
