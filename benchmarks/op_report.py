"""Tables of what was measured; cells of what was not stay empty."""

import math
import statistics
from collections.abc import Sequence

from benchmarks import machine
from benchmarks.checking import Outcome

__all__ = ["op_tables", "ratio", "summary"]


def op_tables(outcomes: Sequence[Outcome]) -> list[str]:
    """Markdown: for each op the headlines, a table of its cases, and omitted contestants with the reason."""
    lines = []
    for op in dict.fromkeys(outcome.op for outcome in outcomes):
        rows = [outcome for outcome in outcomes if outcome.op == op]
        others = list(dict.fromkeys(name for row in rows for name in row.errors | row.times if name != "ours"))
        head = ["shape", "error", "ours, us", "of the roofline"]
        for name in others:
            head += [f"{name}, us", "ratio"]
        lines += [f"### {op}", "", *(line for name in others if (line := headline(rows, name))), ""]
        lines += [*machine.table([*head, "note"], [cells(row, others) for row in rows]), ""]
        for (name, reason), count in left_out(rows).items():
            lines += [f"- {name}: left out of {count} of {len(rows)} shapes: {reason}"]
        lines += [""]
    return lines


def headline(rows: Sequence[Outcome], name: str) -> str:
    ratios = [found for row in rows if (found := ratio(row, name)) is not None]
    return f"- over {name}: {summary(ratios)}" if ratios else ""


def summary(ratios: Sequence[float]) -> str:
    """Geometric mean, smallest, and of how many."""
    mean = math.exp(statistics.fmean(math.log(value) for value in ratios))
    return f"geometric mean {mean:.2f}, smallest {min(ratios):.2f}, of {len(ratios)} shapes"


def ratio(row: Outcome, name: str) -> float | None:
    """Theirs / ours, the median over rounds in which both ran; above 1 ours is faster. None: not measured."""
    if name not in row.times or "ours" not in row.times:
        return None
    pairs = list(zip(row.raw.get(name, []), row.raw.get("ours", []), strict=False))
    return statistics.median(t / o for t, o in pairs) if pairs else row.times[name] / row.times["ours"]


def cells(row: Outcome, others: Sequence[str]) -> list[str]:
    ours = row.times.get("ours")
    found = [
        row.shape,
        f"{row.errors['ours']:.1e}" if "ours" in row.errors else "",
        f"{ours:.1f}" if ours else "",
        f"{row.floor / ours:.0%} {row.bound}".strip() if ours and row.floor else "",
    ]
    for name in others:
        theirs, times = row.times.get(name), ratio(row, name)
        found += [f"{theirs:.1f}" if theirs else "", "" if times is None else f"{times:.2f}"]
    return [*found, row.note]


def left_out(rows: Sequence[Outcome]) -> dict[tuple[str, str], int]:
    found: dict[tuple[str, str], int] = {}
    for row in rows:
        for pair in row.left_out.items():
            found[pair] = found.get(pair, 0) + 1
    return found
