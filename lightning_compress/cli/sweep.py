"""``lightning-compress sweep FOLDER``: one table and one figure of a sweep."""

import argparse
from pathlib import Path

__all__ = ["DESCRIPTION", "SUMMARY", "act", "add_arguments"]

SUMMARY = "one table and one figure of a sweep"
DESCRIPTION = """Compare the jobs of a sweep by the size, the metric, its standard error and the seconds in their
report/summary.json. Prints a table and writes sweep.html (Pareto front, table, links to the pages of the jobs),
sweep.csv, sweep.md and sweep.png into FOLDER. A job that failed, has not ended or did not start is named with the
reason. The standard error is that of the change from the model before
compression; seconds are those of calibration, export and measurements, without training.

FOLDER is the folder of a sweep of `python train.py -m ...` (hydra.sweep.dir), of a Slurm array, or any folder that
holds runs at any depth. Exit code: 0; 1 if a job has no result; 2 for wrong arguments.

    lightning-compress sweep multirun/2026-11-30 --metric perplexity"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the subcommand."""
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("--metric", metavar="NAME", help="metric to compare by; default: the first of the summaries")
    parser.add_argument(
        "--mode", choices=("min", "max"), help="whether smaller or larger is better; default: as the config monitors it"
    )


def act(options: argparse.Namespace) -> int:
    """Compare the jobs; returns the exit code."""
    from lightning_compress.report.sweep_files import report_sweep
    from lightning_compress.report.sweep_jobs import read_jobs

    comparison = report_sweep(options.folder, read_jobs(options.folder), options.metric, options.mode)
    return int(bool(comparison.faults))
