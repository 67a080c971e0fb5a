"""``lightning-compress report FOLDER``: the report of a finished run again."""

import argparse
from pathlib import Path

__all__ = ["DESCRIPTION", "SUMMARY", "act", "add_arguments"]

SUMMARY = "the report of a finished run again"
DESCRIPTION = """Print the table of a finished run again, and write its page (index.html) and its figure anew, from
summary.json and modules.csv.

FOLDER is the folder of a run of a Trainer, an export of `lightning-compress run`, or the folder of a report itself.
Exit code: 0; 2 if the folder holds no report.

    lightning-compress report ./SmolLM2-W4"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the subcommand."""
    parser.add_argument("folder", metavar="FOLDER", type=Path)


def act(options: argparse.Namespace) -> int:
    """Print and write the report; returns the exit code."""
    from lightning_compress.report import page, plots, summary, table
    from lightning_compress.report.stored import read_report

    folder = _folder(options.folder.expanduser().resolve())
    ledger, facts = read_report(folder)
    page.write(folder, ledger, facts)
    plots.error_per_module(ledger, folder / "error_per_module.png", summary.headline(facts))
    table.show(ledger, facts)
    print(f"report: {folder / 'index.html'}")
    return 0


def _folder(folder: Path) -> Path:
    """Where the report of a run or an export is."""
    places = (folder, folder / "report", folder.with_name(f"{folder.name}-report"), folder.parent / "report")
    for place in places:
        if (place / "summary.json").is_file():
            return place
    raise ValueError(
        f"{folder} has no report: expected summary.json in it, in report/, or in {places[2].name}/ beside it"
    )
