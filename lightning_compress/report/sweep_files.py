"""Table, page and figure of a sweep, printed and written into its folder; and a Hydra callback that does it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from hydra.experimental.callback import Callback

from lightning_compress.report.sweep import Comparison, compare
from lightning_compress.report.sweep_figure import metric_over_size
from lightning_compress.report.sweep_jobs import Job, read_jobs
from lightning_compress.report.sweep_page import write_page
from lightning_compress.report.sweep_table import show, write_csv, write_markdown

__all__ = ["SweepReport", "report_sweep"]


class SweepReport(Callback):
    """Reports when the last job of a sweep has ended; ``hydra.callbacks.sweep_report._target_`` names this class.

    Hydra does not call it if a job failed: ``lightning-compress sweep FOLDER`` reports then.
    """

    def on_multirun_end(self, config: Any, **kwargs: Any) -> None:
        """Report, if any job has compressed; only the first of several tasks of srun or torchrun does."""
        if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))):
            return
        folder = Path(config.hydra.sweep.dir)
        jobs = read_jobs(folder)
        if any(job.summary for job in jobs):
            report_sweep(folder, jobs)


def report_sweep(
    folder: Path, jobs: Sequence[Job], metric: str | None = None, mode: Literal["min", "max"] | None = None
) -> Comparison:
    """Print the comparison of jobs, and write sweep.csv, sweep.html, sweep.md and sweep.png into a folder.

    Raises:
        ValueError: See :func:`compare`.
    """
    comparison = compare(jobs, metric, mode)
    show(comparison)
    write_csv(comparison, folder / "sweep.csv")
    write_page(comparison, folder / "sweep.html")
    figure = metric_over_size(comparison, folder / "sweep.png")
    write_markdown(comparison, folder / "sweep.md", figure.name if figure else None)
    names = ["sweep.csv", "sweep.html", "sweep.md", *([figure.name] if figure else [])]
    print("written: " + ", ".join(str(folder / name) for name in names))
    return comparison
