"""A figure of a sweep: the metric of each job over its size, and the Pareto front. Needs the extra ``plot``."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

from lightning_compress.files.atomic_file import whole_file
from lightning_compress.report.sweep import Comparison, Result

__all__ = ["metric_over_size"]

log = logging.getLogger(__name__)

LABELLED = 40  # of more jobs, only those on the front are labelled
MIB = 1024**2
LOG_FROM = 10  # ratio of the largest to the smallest value from which an axis is logarithmic


def metric_over_size(comparison: Comparison, path: str | Path) -> Path | None:
    """Write a PNG: a point for each job, a bar of one standard error, the front as a line, the dense model's metric.

    Returns:
        The path; None where there is nothing to draw, or no matplotlib (a one-line note says which).
    """
    results = [result for result in comparison.results if _is_finite(result)]
    if not results:
        log.info("no figure of the sweep: no job has both a size and a metric")
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.warning("no figure of the sweep: matplotlib is missing; pip install 'lightning-compress[plot]'")
        return None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for on_front, color in ((False, "0.55"), (True, "C0")):
        group = [result for result in results if result.on_front == on_front]
        x, y = [_size(result) for result in group], [_after(result) for result in group]
        error = [result.error or 0.0 for result in group]
        axes.errorbar(x, y, yerr=error, fmt="o", markersize=5, capsize=3, color=color)
    front = sorted((_size(result), _after(result)) for result in results if result.on_front)
    axes.plot(*zip(*front, strict=True), drawstyle="steps-post", color="C0", linewidth=1, label="Pareto front")
    for result in results:
        if result.on_front or len(results) <= LABELLED:
            label, point = _label(result, comparison.keys), (_size(result), _after(result))
            axes.annotate(label, point, xytext=(5, 4), textcoords="offset points", fontsize=7, parse_math=False)
    before = {result.before for result in results}
    if len(before) == 1 and (dense := before.pop()) is not None and math.isfinite(dense):
        axes.axhline(dense, color="0.3", linewidth=1, linestyle=":", label="before compression")
    if _is_wide([_size(result) for result in results]):
        axes.set_xscale("log")
    if _is_wide([_after(result) for result in results]):
        axes.set_yscale("log")
    axes.margins(x=0.15)  # room for labels
    axes.set_xlabel("size of the compressed model, MiB")
    axes.set_ylabel(f"{comparison.metric} (bars: one standard error of the change)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=150, metadata={"Software": None})
    return Path(path)


def _is_finite(result: Result) -> bool:
    return all(value is not None and math.isfinite(value) for value in (result.size, result.after))


def _size(result: Result) -> float:
    return (result.size or 0.0) / MIB


def _after(result: Result) -> float:
    return result.after or 0.0


def _label(result: Result, keys: Sequence[str]) -> str:
    """The value of the only override that differs; of several ``key=value``."""
    values = {key: result.job.overrides[key] for key in keys if key in result.job.overrides}
    if len(keys) == 1:
        return next(iter(values.values()), result.job.name)
    return " ".join(f"{key}={value}" for key, value in values.items()) or result.job.name


def _is_wide(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= LOG_FROM
