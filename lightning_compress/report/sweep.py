"""Jobs of a sweep side by side: size, metric, its standard error, seconds, and the Pareto front of size and metric.

A job is on the front if no other has both a size and a metric that are at least as good, and one of them better. The
standard error is that of the change from the model before compression, paired over the same tokens; it does not
decide who is on the front. Seconds are those of all phases in the summary, of which training is not one.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

from lightning_compress.report.sweep_jobs import Job, differing_keys

__all__ = ["Comparison", "Result", "compare", "pareto_front"]

MODES = {"perplexity": "min", "nll": "min"}  # as training/evaluation.py measures language models


@dataclass(frozen=True)
class Result:
    """What one job came to; None where its summary does not say. Sizes in bytes, ``error`` is the standard error."""

    job: Job
    size_before: float | None
    size: float | None
    bits: float | None
    before: float | None
    after: float | None
    change: float | None
    error: float | None
    seconds: float | None
    on_front: bool = False


@dataclass(frozen=True)
class Comparison:
    """The jobs of a sweep.

    Args:
        metric: The metric that they are compared by; None where no job measured one.
        mode: Whether a smaller ("min") or a larger ("max") value is better.
        keys: Overrides that differ between the jobs.
        results: Of the jobs that have a summary.
        faults: The jobs that have none.
        notes: Remarks on single results, in words.
    """

    metric: str | None
    mode: Literal["min", "max"]
    keys: Sequence[str]
    results: Sequence[Result]
    faults: Sequence[Job]
    notes: Sequence[str]


def compare(jobs: Sequence[Job], metric: str | None = None, mode: Literal["min", "max"] | None = None) -> Comparison:
    """Compare jobs by a metric of their summaries.

    Args:
        jobs: Jobs of one or several sweeps.
        metric: Default: the first metric of the first job that has one.
        mode: Default: "min" for perplexity; else the mode of the callback that monitors the metric.

    Raises:
        ValueError: No job has this metric, or nothing says which of its values are better.
    """
    finished = [job for job in jobs if not job.fault]
    names = list(dict.fromkeys(name for job in finished for name in _metrics(job)))
    if metric is not None and metric not in names:
        raise ValueError(f"no job has a metric {metric!r}; their metrics: {', '.join(names) or 'none'}")
    metric = metric or next(iter(names), None)
    mode = mode or _mode(metric, jobs)
    results = [_result(job, metric) for job in finished]
    sign = 1.0 if mode == "min" else -1.0
    points = [(_or_nan(result.size), sign * _or_nan(result.after)) for result in results]
    results = [replace(result, on_front=on) for result, on in zip(results, pareto_front(points), strict=True)]
    faults = [job for job in jobs if job.fault]
    return Comparison(metric, mode, differing_keys(jobs), results, faults, _notes(results, metric))


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points are on the front, where smaller is better in both; a point with a NaN or an infinity is not."""
    finite = sorted({point for point in points if all(map(math.isfinite, point))})
    front, best = set(), math.inf
    for _, group in groupby(finite, key=lambda point: point[0]):
        first = next(group)  # the best of its size
        if first[1] < best:
            front.add(first)
            best = first[1]
    return [point in front for point in points]


def _result(job: Job, metric: str | None) -> Result:
    summary, entry = job.summary, _metrics(job).get(metric or "", {})
    seconds = summary.get("seconds")
    spent = [_number(value) or 0.0 for value in seconds.values()] if isinstance(seconds, dict) else []
    return Result(
        job,
        size_before=_number(summary.get("model_bytes_before")),
        size=_number(summary.get("model_bytes_after")),
        bits=_number(summary.get("bits_per_weight")),
        before=_number(entry.get("before")),
        after=_number(entry.get("after")),
        change=_number(entry.get("difference")),
        error=_number(entry.get("standard_error")),
        seconds=sum(spent) if spent else None,
    )


def _metrics(job: Job) -> dict[str, dict[str, Any]]:
    entries = job.summary.get("metric")
    return {n: e for n, e in entries.items() if isinstance(e, dict)} if isinstance(entries, dict) else {}


def _mode(metric: str | None, jobs: Iterable[Job]) -> Literal["min", "max"]:
    if metric is None:
        return "min"
    modes = {job.modes[metric] for job in jobs if metric in job.modes} or {MODES.get(metric, "")}
    if modes == {"min"}:
        return "min"
    if modes == {"max"}:
        return "max"
    reason = "no callback in the jobs' configs monitors it" if modes == {""} else "the jobs' configs differ in it"
    raise ValueError(f"is a smaller or a larger {metric!r} better? {reason}; give --mode min or --mode max")


def _notes(results: Sequence[Result], metric: str | None) -> list[str]:
    """One line for each kind of remark, with the names of its jobs."""
    names: dict[str, list[str]] = {}
    for result in results:
        summary = result.job.summary
        verify = summary.get("verify")
        if metric is not None and result.after is None:
            names.setdefault(f"no {metric} was measured", []).append(result.job.name)
        if "export_dir" not in summary:
            names.setdefault("nothing was exported", []).append(result.job.name)
        if isinstance(verify, dict) and verify.get("fault"):
            names.setdefault(str(verify["fault"]), []).append(result.job.name)
    return [f"{note}: {', '.join(jobs)}" for note, jobs in names.items()]


def _number(value: Any) -> float | None:
    """summary.json writes NaN and infinity as words."""
    try:
        return None if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
