"""The console command:  lightning-compress sweep FOLDER,  lightning-compress plan FOLDER RECIPE

Every subcommand is a thin caller of a function of the package.
"""

import argparse
import json
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


PLAN = """Print what a recipe would do to a model of transformers: modules and schemes, bytes, memory, seconds on this
machine, who can read the result, and what set-up would refuse. Weights are not read; nothing is written.

FOLDER holds a dense model. RECIPE is a name such as gptq_w4, or the path of a recipe file. Exit code: 0; 1 if the
recipe is refused; 2 for wrong arguments."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="lightning-compress", description="Tools for runs of lightning-compress.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    raw = argparse.RawDescriptionHelpFormatter
    sweep = commands.add_parser(
        "sweep", help="one table and one figure of a sweep", description=SWEEP, formatter_class=raw
    )
    sweep.add_argument("folder", metavar="FOLDER", type=Path)
    sweep.add_argument("--metric", metavar="NAME", help="metric to compare by; default: the first one of the summaries")
    sweep.add_argument(
        "--mode", choices=("min", "max"), help="whether smaller or larger is better; default: as the config monitors it"
    )
    sweep.set_defaults(action=_sweep)
    plan = commands.add_parser("plan", help="what a recipe would do and take", description=PLAN, formatter_class=raw)
    plan.add_argument("folder", metavar="FOLDER", type=Path)
    plan.add_argument("recipe", metavar="RECIPE")
    for name, default, what in (
        ("batches", 16, "of calibration"),
        ("rows", 2, "of a batch"),
        ("tokens", 512, "of a row"),
    ):
        plan.add_argument(f"--{name}", metavar="N", type=int, default=default, help=f"{what} (default: {default})")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    plan.set_defaults(action=_plan)
    options = parser.parse_args(arguments)
    try:
        code: int = options.action(options)
    except ValueError as error:
        print(f"lightning-compress: {error}", file=sys.stderr)
        return 2
    return code


def _sweep(options: argparse.Namespace) -> int:
    comparison = report_sweep(options.folder, read_jobs(options.folder), options.metric, options.mode)
    return int(bool(comparison.faults))


def _plan(options: argparse.Namespace) -> int:
    from lightning_compress.planning.folder import plan_folder  # torch takes seconds to import, which --help needs not

    plan = plan_folder(options.folder, options.recipe, options.batches, options.rows, options.tokens)
    print(json.dumps(plan.to_json(), indent=2)) if options.json else plan.show()
    return int(bool(plan.refusals))


if __name__ == "__main__":
    sys.exit(main())
