"""The best point of a grid that is a line, without looking at every point on all of the data.

Points of a line have neighbours: every second one is tried first, then those beside the best. And two points differ far
less from batch to batch than either of their errors does, so that some of the data tells good ones from bad ones: all
are tried on the first batches, the better quarter on as many more, and so on (successive halving, Jamieson &
Talwalkar, 2016, arXiv:1502.07943). The first point stays to the end: nothing that is worse than it can win.
"""

import math
from collections.abc import Callable, Sequence

__all__ = ["FIRST_TOKENS", "race", "rungs", "winner"]

FIRST_TOKENS = 512  # of the first rung, at least
QUARTER = 4


def rungs(tokens: Sequence[int]) -> list[list[int]]:
    """Batches of each rung, by index: the first ones up to 512 tokens, then as many again as went before, to the end.

    Args:
        tokens: That count, of each batch.
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
    """Error of each point over all rungs; inf for those that were given up before, or not tried.

    Args:
        points: How many; point 0 stands apart, the others lie on a line in their order.
        errors: ``errors(some points, rung)``: their error on the data of one rung, a sum, in the order of the points.
        rounds: How many rungs there are.
    """
    total = [math.inf] * points

    def run(some: Sequence[int], rung: int) -> None:
        for k, error in zip(some, errors(some, rung), strict=True):
            total[k] = error if rung == 0 else total[k] + error

    tried = [0, *range(1, points, 2)]
    run(tried, 0)
    while True:
        best = winner(total)  # those that were not tried are at infinity
        beside = [k for k in (best - 1, best + 1) if 0 < k < points and k not in tried] if best else []
        if not beside:
            break
        run(beside, 0)
        tried += beside
    for rung in range(1, rounds):
        stay = math.ceil(points / QUARTER**rung)
        kept = sorted(tried, key=lambda k: _rank(total, k))[:stay]
        for k in set(tried) - {0, *kept}:
            total[k] = math.inf
        tried = [0, *sorted(set(kept) - {0})]
        run(tried, rung)
    return total


def winner(errors: Sequence[float]) -> int:
    """The point with the least error: what is not finite never wins, a tie goes to the first."""
    return min(range(len(errors)), key=lambda k: _rank(errors, k))


def _rank(errors: Sequence[float], k: int) -> tuple[float, int]:
    return (errors[k] if math.isfinite(errors[k]) else math.inf), k
