"""The race over a grid: what wins is the best where there is one valley, and nothing worse beats the first point."""

import math

import pytest
import torch
from torch import nn

from lightning_compress.layerwise.parent import ParentCalls
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
    """Race over errors [points, rungs]; the totals, and how many cells were looked at."""
    looked = []

    def errors(some, rung):
        looked.extend((k, rung) for k in some)
        return [float(table[k, rung]) for k in some]

    total = race(len(table), errors, table.shape[1])
    assert len(looked) == len(set(looked))  # nothing is computed twice
    return total, len(looked)


@pytest.mark.parametrize("rounds", [1, 3, 5])
@pytest.mark.parametrize("best", range(1, 20))
def test_a_valley_is_found_with_few_looks(best, rounds):
    torch.manual_seed(best)
    valley = 1 + (torch.arange(20) - best).abs().double() / 10
    valley[0] = 1.5
    common = torch.rand(rounds).double() * 10  # batches differ a lot, but for all points alike
    total, looks = run(valley[:, None] + common)
    assert min(range(20), key=total.__getitem__) == best
    assert total[best] == pytest.approx(float(valley[best] * rounds + common.sum()))
    assert looks <= 13 + 6 * (rounds > 1) + 3 * max(0, rounds - 2)


def test_the_first_point_goes_all_the_way_and_wins_where_it_is_best():
    table = torch.full((20, 4), 2.0).double()
    table[0] = torch.tensor([3.0, 1.0, 1.0, 1.0])  # behind on the first rung, best of all in the end
    total, _ = run(table)
    assert total[0] == 6.0
    assert all(t > total[0] for t in total[1:])
    table = torch.ones(20, 3).double()
    total, _ = run(table)
    assert min(range(20), key=lambda k: (total[k], k)) == 0  # a tie is rounding to nearest


def test_what_is_not_finite_never_wins():
    table = torch.full((7, 2), 2.0).double()
    table[3] = math.nan
    table[5] = math.inf
    table[1] = 1.0
    total, _ = run(table)
    assert min(range(7), key=lambda k: (total[k] if math.isfinite(total[k]) else math.inf, k)) == 1
    table[0, 0] = math.nan
    assert math.isnan(run(table)[0][0])  # the caller says so


@pytest.mark.parametrize("points", [1, 2, 3])
def test_short_grids_are_tried_whole_on_the_first_rung(points):
    total, _ = run(torch.arange(points, 0, -1)[:, None].double())
    assert total == [float(points - k) for k in range(points)]


# -- calls in pieces --------------------------------------------------------------------------------------------------


class Mixing(nn.Module):
    """Samples are apart in it, unless told otherwise."""

    def __init__(self, across: bool = False):
        super().__init__()
        self.linear, self.across = nn.Linear(6, 6), across

    def forward(self, x, shift, scale=None):
        y = self.linear(x) * scale + shift
        return (y - y.mean(0) if self.across else y,)


def kept(module, samples=5, tokens=4):
    calls = ParentCalls(module)
    for _ in range(2):
        x, shift, scale = torch.randn(samples, tokens, 6), torch.randn(1, tokens, 6), torch.rand(samples, 1, 1)
        mask = torch.rand(samples, tokens) > 0.3
        with torch.no_grad():
            calls.add((x, shift), {"scale": scale}, module(x, shift, scale=scale)[0], mask)
    return calls


def test_pieces_have_the_error_of_the_whole():
    module = Mixing()
    calls = kept(module)
    pieces = calls.split(8)
    assert [len(output) for output in pieces.outputs] == [2, 2, 1] * 2  # two samples of four tokens
    assert sum(pieces.tokens()) == sum(calls.tokens()) == sum(int(mask.sum()) for mask in calls.masks)
    module.linear.weight.data += 0.1 * torch.randn(6, 6)
    with torch.no_grad():
        whole, parts = calls.squared_error([0, 1]), pieces.squared_error(range(6))
        direct = sum(
            float((module(*a, **k)[0] - y)[m].square().sum())
            for (a, k), y, m in zip(calls.arguments, calls.outputs, calls.masks, strict=True)
        )
    assert whole == pytest.approx(direct, rel=1e-5)
    assert parts == pytest.approx(whole, rel=1e-5)
    assert calls.split(10_000) is calls


def test_a_parent_that_mixes_samples_is_called_as_it_was():
    with torch.no_grad():
        calls = kept(Mixing(across=True))
        assert calls.split(8) is calls
