"""The race over a grid: the best point of one valley wins, and no point that is worse beats the first one."""

import math

import pytest
import torch

from lightning_compress.modifiers.smoothing.successive_halving import FIRST_TOKENS, race, rungs


@pytest.mark.parametrize(("tokens", "expected"), [
    ([FIRST_TOKENS] * 4, [[0], [1], [2, 3]]),
    ([FIRST_TOKENS] * 9, [[0], [1], [2, 3], [4, 5, 6, 7], [8]]),
    ([FIRST_TOKENS // 4] * 10, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]),
    ([5, 5], [[0, 1]]),
    ([10 * FIRST_TOKENS], [[0]]),
    ([0, 0, FIRST_TOKENS], [[0, 1, 2]]),
], ids=str)  # fmt: skip
def test_every_batch_is_in_one_rung(tokens, expected):
    assert rungs(tokens) == expected


def run(table):
    """Race over errors [points, rungs]; the totals, and how many cells were evaluated."""
    evaluated = []

    def errors(chosen, rung):
        evaluated.extend((k, rung) for k in chosen)
        return [float(table[k, rung]) for k in chosen]

    total = race(len(table), errors, table.shape[1])
    assert len(evaluated) == len(set(evaluated))  # nothing is computed twice
    return total, len(evaluated)


@pytest.mark.parametrize("rounds", [1, 3, 5])
@pytest.mark.parametrize("best", range(1, 20))
def test_a_valley_is_found_with_few_evaluations(best, rounds):
    torch.manual_seed(best)
    valley = 1 + (torch.arange(20) - best).abs().double() / 10
    valley[0] = 1.5
    common = torch.rand(rounds).double() * 10  # batches differ a lot, but for all points alike
    total, evaluations = run(valley[:, None] + common)
    assert min(range(20), key=total.__getitem__) == best
    assert total[best] == pytest.approx(float(valley[best] * rounds + common.sum()))
    assert evaluations <= 13 + 6 * (rounds > 1) + 3 * max(0, rounds - 2)


def test_the_first_point_goes_all_the_way_and_wins_where_it_is_best():
    table = torch.full((20, 4), 2.0).double()
    table[0] = torch.tensor([3.0, 1.0, 1.0, 1.0])  # behind on the first rung, best of all in the end
    total, _ = run(table)
    assert total[0] == 6.0
    assert all(t > total[0] for t in total[1:])
    table = torch.ones(20, 3).double()
    total, _ = run(table)
    assert min(range(20), key=lambda k: (total[k], k)) == 0  # a tie is rounding to nearest


def test_a_point_that_is_not_finite_never_wins():
    table = torch.full((7, 2), 2.0).double()
    table[3] = math.nan
    table[5] = math.inf
    table[1] = 1.0
    total, _ = run(table)
    assert min(range(7), key=lambda k: (total[k] if math.isfinite(total[k]) else math.inf, k)) == 1
    table[0, 0] = math.nan
    assert math.isnan(run(table)[0][0])  # the caller raises


@pytest.mark.parametrize("points", [1, 2, 3])
def test_all_points_of_short_grids_are_tried_on_the_first_rung(points):
    total, _ = run(torch.arange(points, 0, -1)[:, None].double())
    assert total == [float(points - k) for k in range(points)]
