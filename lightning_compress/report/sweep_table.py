"""The comparison of a sweep as text: on the screen, as CSV with every figure in full, and as Markdown."""

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console

from lightning_compress.files.atomic_file import whole_file
from lightning_compress.report.section import Section, number, print_section, size
from lightning_compress.report.sweep import Comparison, Result

__all__ = ["notes", "render", "section", "show", "write_csv", "write_markdown"]

WIDTH = 100  # columns where the output is not a terminal
FIGURES = ("size_before", "size", "bits", "before", "after", "change", "error", "seconds")  # of a Result, in the CSV


def render(comparison: Comparison, width: int = WIDTH) -> str:
    """The table, the jobs without a result and the notes, as plain text."""
    text = io.StringIO()
    _print(Console(file=text, width=width), comparison)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def show(comparison: Comparison, file: TextIO | None = None) -> None:
    """Print it to ``file`` (default: the screen), as wide as a terminal is."""
    file = sys.stdout if file is None else file
    if file.isatty():
        _print(Console(file=file), comparison)
    else:
        print(render(comparison), end="", file=file)


def write_csv(comparison: Comparison, path: str | Path) -> None:
    """A line for each job, those without a result included: numbers in full, sizes in bytes."""
    with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["job", *comparison.keys, "metric", *FIGURES, "on_front", "fault"])
        for result in comparison.results:
            figures = ["" if (value := getattr(result, name)) is None else f"{value:.17g}" for name in FIGURES]
            row = [*_overrides(comparison, result.job.overrides), comparison.metric or "", *figures]
            table.writerow([result.job.name, *row, int(result.on_front), ""])
        for job in comparison.faults:
            table.writerow([job.name, *_overrides(comparison, job.overrides), *[""] * (len(FIGURES) + 2), job.fault])


def write_markdown(comparison: Comparison, path: str | Path, figure: str | None = None) -> None:
    """The table as on the screen; ``figure`` is the path of an image to show below it."""
    table = section(comparison)
    lines = [f"{table.title}.", "", _pipes(table.header)]
    lines += [_pipes(["---" if name in table.words else "---:" for name in table.header])]
    lines += [_pipes(row) for row in table.rows]
    if lines_below := [*_faults(comparison), *notes(comparison)]:
        lines += ["", *(f"- {line}" for line in lines_below)]
    if figure is not None:
        lines += ["", f"![{comparison.metric} over size]({figure})"]
    with whole_file(path) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _print(console: Console, comparison: Comparison) -> None:
    print_section(console, section(comparison))
    console.print()
    for line in [*_faults(comparison), *notes(comparison)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def section(comparison: Comparison) -> Section:
    """A row for each job that has a result."""
    metric, results = comparison.metric, comparison.results
    differ = len({result.before for result in results}) > 1
    figures = [*(["before"] if differ else []), "after", "change ± std. error"] if metric else []
    header = ["job", *comparison.keys, "size", "bits", *figures, "seconds", "front"]
    rows = [
        [result.job.name, *_overrides(comparison, result.job.overrides), *_figures(result, bool(metric), differ)]
        for result in results
    ]
    total = len(results) + len(comparison.faults)
    title = f"results of {len(results)} of {total} jobs"
    if metric:
        better = "smaller" if comparison.mode == "min" else "larger"
        title += f"; {metric} ({better} is better), * marks the Pareto front of size and {metric}"
    return Section(title, header, rows, words=("job", *comparison.keys, "front"))


def _figures(result: Result, has_metric: bool, differ: bool) -> list[str]:
    error = "" if result.error is None else f" ± {number(result.error, digits=2)}"
    before = [number(result.before, digits=6)] if differ else []
    metric = [*before, number(result.after, digits=6), number(result.change, "+") + error] if has_metric else []
    mark = "*" if result.on_front else ""
    return [size(result.size), number(result.bits), *metric, number(result.seconds, digits=3), mark]


def _overrides(comparison: Comparison, overrides: Mapping[str, str]) -> list[str]:
    return [overrides.get(key, "") for key in comparison.keys]


def _faults(comparison: Comparison) -> list[str]:
    """Each job without a result, by name and overrides."""
    lines = []
    for job in comparison.faults:
        values = " ".join(f"{key}={job.overrides[key]}" for key in comparison.keys if key in job.overrides)
        lines.append(f"no result: job {job.name}{f' ({values})' if values else ''}: {job.fault}")
    return lines


def notes(comparison: Comparison) -> list[str]:
    """What all jobs have in common, and the remarks."""
    first = next(iter(comparison.results), None)
    common = []
    if first is not None and len({(result.before, result.size_before) for result in comparison.results}) == 1:
        metric = [f"{comparison.metric} {number(first.before, digits=6)}"] if first.before is not None else []
        bytes_before = [size(first.size_before)] if first.size_before is not None else []
        common = [f"before compression: {', '.join([*metric, *bytes_before])}"] if metric or bytes_before else []
    return [*common, *comparison.notes]


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
