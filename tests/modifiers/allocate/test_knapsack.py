"""The choice against all choices; coarse units keep the budget."""

import itertools

import pytest
import torch

from lightning_compress.modifiers.allocate import knapsack
from lightning_compress.modifiers.allocate.knapsack import choose


def problem(seed, groups=6, options=4, unit=1):
    random = torch.Generator().manual_seed(seed)
    sizes = unit * torch.randint(1, 40, (groups, options), generator=random)
    losses = torch.rand(groups, options, generator=random, dtype=torch.float64)
    return sizes.tolist(), losses.tolist()


def total(values, choice):
    return sum(row[k] for row, k in zip(values, choice, strict=True))


@pytest.mark.parametrize("unit", [1, 24])
@pytest.mark.parametrize("seed", range(4))
def test_no_choice_within_the_budget_is_better(seed, unit):
    sizes, losses = problem(seed, unit=unit)
    everything = list(itertools.product(range(4), repeat=6))
    for budget in (sum(map(min, sizes)), sum(map(min, sizes)) + 37 * unit, 100 * unit, sum(map(max, sizes)) + 5):
        best = min(total(losses, choice) for choice in everything if total(sizes, choice) <= budget)
        choice = choose(sizes, losses, budget)
        assert total(sizes, choice) <= budget
        assert total(losses, choice) == pytest.approx(best, abs=1e-12)


def test_many_sizes_are_rounded_up(monkeypatch):
    monkeypatch.setattr(knapsack, "CELLS", 64)
    sizes, losses = problem(0, groups=12, unit=1)
    sizes = [[997 * size + k for k, size in enumerate(row)] for row in sizes]  # without a common divisor
    budget = sum(map(min, sizes)) + 90_000
    choice = choose(sizes, losses, budget)
    assert budget - 12 * 90_000 / 64 - 40 * 997 <= total(sizes, choice) <= budget
    monkeypatch.undo()
    exact = total(losses, choose(sizes, losses, budget))
    assert exact <= total(losses, choice) <= exact + 0.5


def test_equal_losses_take_the_smaller_option():
    assert choose([[8, 4, 6]], [[1.0, 1.0, 1.0]], 100) == [1]
