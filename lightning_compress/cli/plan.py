"""``lightning-compress plan FOLDER RECIPE``: what a recipe would do and take."""

import argparse
import json
from pathlib import Path

__all__ = ["DESCRIPTION", "SUMMARY", "act", "add_arguments", "add_data_sizes"]

SUMMARY = "what a recipe would do and take"
DESCRIPTION = """Print what a recipe would do to a model of transformers: modules and schemes, bytes, memory, seconds on
this machine, who can read the result, and what set-up would refuse. Weights are not read; nothing is written.

FOLDER holds a dense model. RECIPE is a name such as gptq_w4, or the path of a recipe file. Exit code: 0; 1 if the
recipe is refused; 2 for wrong arguments.

    lightning-compress plan ./SmolLM2 gptq_w4"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the subcommand."""
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("recipe", metavar="RECIPE")
    add_data_sizes(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def add_data_sizes(parser: argparse.ArgumentParser) -> None:
    """How much calibration data there is."""
    for name, default, what in (
        ("batches", 16, "of calibration"),
        ("rows", 2, "of a batch"),
        ("tokens", 512, "of a row"),
    ):
        parser.add_argument(f"--{name}", metavar="N", type=int, default=default, help=f"{what} (default: {default})")


def act(options: argparse.Namespace) -> int:
    """Make the plan and print it; returns the exit code."""
    from lightning_compress.planning.folder import plan_folder

    plan = plan_folder(options.folder, options.recipe, options.batches, options.rows, options.tokens)
    print(json.dumps(plan.to_json(), indent=2)) if options.json else plan.show()
    return int(bool(plan.refusals))
