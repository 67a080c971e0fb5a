"""Conflicts of a modifier that changes shapes with one that stores tensors of these shapes: masks, scales."""

import math
from typing import Any

__all__ = ["shape_conflict"]

SET_UP, AFTERWARDS = -1.0, math.inf  # as points in time: before the first batch, after the last


def shape_conflict(cutting: Any, other: Any, shared: set[str], earlier: bool) -> str | None:
    """Why a modifier changes shapes too late for ``other``, and what to do; None when it does not.

    Windows in different units cannot be compared here; a conflict between those is an error at the cut.

    ``shared`` are modules that both modifiers change; ``earlier``: whether ``other`` comes before ``cutting``, whose
    ``needs.changes_shapes`` is True, in the recipe.
    """
    if other.needs.fixed_shapes_from == "never" or not shared:
        return None
    until = cutting.start if cutting.end is None else cutting.end
    if cutting.start == 0 and cutting.end is None:
        until = SET_UP
    stored_from = SET_UP if other.needs.fixed_shapes_from == "set-up" or other.start == 0 else other.start
    until, stored_from = (AFTERWARDS if point is None else point for point in (until, stored_from))
    comparable = cutting.unit == other.unit or until in (SET_UP, AFTERWARDS) or stored_from in (SET_UP, AFTERWARDS)
    if not comparable or until < stored_from or (until == stored_from and not earlier):
        return None
    cut_first = "cut at set-up, with start=0 and no end, and let it stand first in the recipe"
    later = "" if other.needs.fixed_shapes_from == "set-up" else ", or let the other begin when the last cut is made"
    return f"{sorted(shared)[0]!r} changes its shape after the other keeps tensors of that shape; {cut_first}{later}"
