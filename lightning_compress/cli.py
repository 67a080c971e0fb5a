"""The console command:  lightning-compress sweep FOLDER

Every subcommand is a thin caller of a function of the package.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_compress.report.sweep_files import report_sweep
from lightning_compress.report.sweep_jobs import read_jobs

__all__ = ["main"]

SWEEP = """Compare the jobs of a sweep by the size, the metric, its standard error and the seconds in their
report/summary.json. Prints a table and writes sweep.csv, sweep.md and sweep.png into FOLDER. A job that failed, has not
ended or did not start is named with the reason. The standard error is that of the change from the model before
compression; seconds are those of calibration, export and measurements, without training.

FOLDER is the folder of a sweep of `python train.py -m ...` (hydra.sweep.dir), of a Slurm array, or any folder that
holds runs at any depth. Exit code: 0; 1 if a job has no result; 2 for wrong arguments."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="lightning-compress", description="Tools for runs of lightning-compress.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    sweep = commands.add_parser(
        "sweep",
        help="one table and one figure of a sweep",
        description=SWEEP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sweep.add_argument("folder", metavar="FOLDER", type=Path)
    sweep.add_argument("--metric", metavar="NAME", help="metric to compare by; default: the first one of the summaries")
    sweep.add_argument(
        "--mode", choices=("min", "max"), help="whether smaller or larger is better; default: as the config monitors it"
    )
    options = parser.parse_args(arguments)
    try:
        comparison = report_sweep(options.folder, read_jobs(options.folder), options.metric, options.mode)
    except ValueError as error:
        print(f"lightning-compress: {error}", file=sys.stderr)
        return 2
    return int(bool(comparison.faults))


if __name__ == "__main__":
    sys.exit(main())
