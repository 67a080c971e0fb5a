"""``sweep.html``: the jobs of a sweep on one page, in one file: the Pareto front, the table, what failed and why.

Each job is a number in the chart and a row of the table, which links to the page of the job (report/page.py).
"""

import math
from pathlib import Path
from urllib.parse import quote

from lightning_compress.files.atomic_file import whole_file
from lightning_compress.report.charts import Chart, Value, chart
from lightning_compress.report.page import template
from lightning_compress.report.section import number, size
from lightning_compress.report.sweep import Comparison, Result
from lightning_compress.report.sweep_table import notes, section

__all__ = ["write_page"]

MIB = 1024**2


def write_page(comparison: Comparison, path: str | Path) -> None:
    """Write the page; it is there whole or not at all.

    Args:
        comparison: The jobs.
        path: The file, in the folder that the names of the jobs are relative to: links are relative, too.
    """
    folder, table = Path(path).parent, section(comparison)
    faults = [
        (
            job.name,
            " ".join(f"{key}={job.overrides[key]}" for key in comparison.keys if key in job.overrides),
            job.fault,
        )
        for job in comparison.faults
    ]
    text = template("sweep.html.jinja").render(
        title=f"Sweep {folder.resolve().name}",
        table=table,
        jobs=[(_link(folder, result), row) for result, row in zip(comparison.results, table.rows, strict=True)],
        chart=_chart(comparison),
        faults=faults,
        notes=notes(comparison),
    )
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _link(folder: Path, result: Result) -> str:
    """The page of a job; empty where it has none."""
    page = Path(result.job.name, "report", "index.html")
    return quote(page.as_posix()) if (folder / page).is_file() else ""


def _chart(comparison: Comparison) -> Chart | None:
    """The metric over the size; None where no job has both."""
    metric, values = str(comparison.metric), []
    for place, result in enumerate(comparison.results, 1):
        if _is_finite(result.size) and _is_finite(result.after):
            error = result.error if _is_finite(result.error) else None
            spread = "" if error is None else f" ± {number(error, digits=2)}"
            name = f"{result.job.name}: {size(result.size)}, {metric} {number(result.after)}{spread}"
            values.append(
                Value(name, (result.size or 0) / MIB, result.after or 0, error or 0, str(place), result.on_front)
            )
    if not values:
        return None
    before = {result.before for result in comparison.results}
    dense = before.pop() if len(before) == 1 else None
    return chart(
        f"{metric} over size",
        values,
        "size, MiB",
        f"{metric} (bars: one standard error of the change)",
        line=_steps(sorted((value.x, value.y) for value in values if value.bold)),
        reference=(dense, "before compression") if dense is not None and math.isfinite(dense) else None,
    )


def _steps(front: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of a staircase: what is on the front at a size holds up to the next one."""
    corners = front[:1]
    for x, y in front[1:]:
        corners += [(x, corners[-1][1]), (x, y)]
    return corners


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
