"""``lightning-compress verify FOLDER``: whether an exported folder is complete, sound, and gives the right outputs."""

import argparse
import sys
from pathlib import Path
from typing import Any

__all__ = ["DESCRIPTION", "SUMMARY", "act", "add_arguments"]

SUMMARY = "check an exported folder"
DESCRIPTION = """Check an exported folder: its files are those of its manifest; all tensors are finite; they have the
shapes of the config; codes survive loading and saving; plain transformers loads it in another process, with the outputs
of lightning_compress.load. With --dense the outputs are compared with those of the dense model: on the text of --data,
which also gives both perplexities, else on the dummy inputs of transformers.

Code in the folder is not run, and pickles are not read. Exit code: 0; 1 if a check failed; 2 for wrong arguments.

    lightning-compress verify ./SmolLM2-W4 --dense ./SmolLM2 --data wiki.txt"""
MARKS = {True: "ok  ", False: "FAIL", None: "-   "}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the subcommand."""
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("--dense", metavar="FOLDER", type=Path, help="folder of the dense model")
    parser.add_argument("--data", metavar="TEXT_FILE", default="none", help="text for the comparison of outputs")
    for name, default, what in (("rows", 4, "of text, one call for each"), ("tokens", 256, "of a row")):
        parser.add_argument(f"--{name}", metavar="N", type=int, default=default, help=f"{what} (default: {default})")


def act(options: argparse.Namespace) -> int:
    """Make the checks and print them; returns the exit code."""
    from lightning_compress.export.folder_checks import check_folder

    folders = [folder for folder in (options.folder, options.dense) if folder is not None]
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise ValueError(f"{missing[0]} is not a folder")
    failures = 0
    for check in check_folder(options.folder, options.dense, _batches(options)):
        print(f"{MARKS[check.passed]}  {check.name}: {check.note}")
        sys.stdout.flush()
        failures += check.passed is False
    return int(failures > 0)


def _batches(options: argparse.Namespace) -> list[dict[str, Any]]:
    if options.data == "none":
        return []
    from lightning_compress.cli.text_rows import text_batches, tokenizer_of

    return text_batches(Path(options.data), tokenizer_of(options.folder), options.rows, 1, options.tokens)
