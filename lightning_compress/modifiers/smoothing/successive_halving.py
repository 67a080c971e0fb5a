"""The best point of a grid along a line, without evaluating every point on all of the data.

Points of a line have neighbours: every second one is tried first, then the neighbours of the best. And the difference
of two points varies far less from batch to batch than their errors do, so that some of the data tells good points from
bad ones: all are tried on the first batches, the better quarter on as many more, and so on (successive halving,
Jamieson & Talwalkar, 2016, arXiv:1502.07943). The first point stays to the end: no point that is worse can win.
"""

import math
from collections.abc import Callable, Sequence

__all__ = ["FIRST_TOKENS", "race", "rungs", "winner"]

FIRST_TOKENS = 512  # of the first rung, at least
QUARTER = 4


def rungs(tokens: Sequence[int]) -> list[list[int]]:
    """Batches of each rung, by index: the first ones up to 512 tokens, then as many again as in all rungs before.

    Args:
        tokens: Number of tokens of each batch.
    """
    ends: list[int] = []
    seen = 0
    for i, count in enumerate(tokens, 1):
        seen += count
        due = i >= 2 * ends[-1] if ends else seen >= FIRST_TOKENS
        if due or i == len(tokens):
            ends.append(i)
    return [list(range(low, high)) for low, high in zip([0, *ends], ends, strict=False)]


def race(points: int, errors: Callable[[Sequence[int], int], Sequence[float]], rounds: int) -> list[float]:
    """Error of each point over all rungs; inf for points that left the race or were not tried.

    Args:
        points: Number of points; point 0 stands apart, the others lie on a line in their order.
        errors: ``errors(points, rung)``: summed error of each of these points on the data of one rung.
        rounds: Number of rungs.
    """
    total = [math.inf] * points

    def run(chosen: Sequence[int], rung: int) -> None:
        for k, error in zip(chosen, errors(chosen, rung), strict=True):
            total[k] = error if rung == 0 else total[k] + error

    tried = [0, *range(1, points, 2)]
    run(tried, 0)
    while True:
        best = winner(total)  # points that were not tried are at infinity
        neighbours = [k for k in (best - 1, best + 1) if 0 < k < points and k not in tried] if best else []
        if not neighbours:
            break
        run(neighbours, 0)
        tried += neighbours
    for rung in range(1, rounds):
        best_points = sorted(tried, key=lambda k: _rank(total, k))[: math.ceil(points / QUARTER**rung)]
        for k in set(tried) - {0, *best_points}:
            total[k] = math.inf
        tried = [0, *sorted(set(best_points) - {0})]
        run(tried, rung)
    return total


def winner(errors: Sequence[float]) -> int:
    """The point with the least error; one that is not finite never wins, a tie goes to the first."""
    return min(range(len(errors)), key=lambda k: _rank(errors, k))


def _rank(errors: Sequence[float], k: int) -> tuple[float, int]:
    return (errors[k] if math.isfinite(errors[k]) else math.inf), k
