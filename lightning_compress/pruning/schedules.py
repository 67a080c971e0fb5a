r"""Curves of a quantity from its initial to its final value during training.

With progress :math:`p = (t - t_0) / (t_1 - t_0)` held inside [0, 1], every schedule is a curve c(p) with c(0) = 0 and
c(1) = 1, and the value is ``initial + (final - initial) * c(p)``:

    constant     1                      the last value at once
    linear       p
    cosine       (1 - cos(pi p)) / 2
    cubic        1 - (1 - p)^3          Zhu & Gupta 2017, "To prune, or not to prune", arXiv:1710.01878, eq. (1)
    polynomial   1 - (1 - p)^power      cubic is power 3
"""

import math
from typing import Literal, get_args

__all__ = ["Schedule", "progress", "value_at"]

Schedule = Literal["constant", "linear", "cosine", "cubic", "polynomial"]


def value_at(schedule: Schedule, p: float, initial: float, final: float, power: float = 3.0) -> float:
    """The value at progress ``p``; exactly ``initial`` at 0 (but for ``constant``) and exactly ``final`` at 1.

    Args:
        schedule: One of the curves above.
        p: Progress, clamped to [0, 1].
        initial: Value at the start.
        final: Value at the end.
        power: Exponent of ``polynomial``.

    Raises:
        ValueError: The schedule is unknown.
    """
    p = min(max(p, 0.0), 1.0)
    if schedule == "constant" or p == 1.0:
        return final
    match schedule:
        case "linear":
            curve = p
        case "cosine":
            curve = (1 - math.cos(math.pi * p)) / 2
        case "cubic":
            curve = 1 - (1 - p) ** 3
        case "polynomial":
            curve = 1 - (1 - p) ** power
        case _:
            raise ValueError(f"schedule={schedule!r} is unknown; expected one of {', '.join(get_args(Schedule))}")
    return initial + (final - initial) * curve


def progress(index: float, start: float, end: float) -> float:
    """How much of the window has passed, in [0, 1]; 1 for an empty window that has begun."""
    if end <= start:
        return 1.0 if index >= start else 0.0
    return min(max((index - start) / (end - start), 0.0), 1.0)
