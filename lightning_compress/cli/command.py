"""``lightning-compress COMMAND ...``: arguments, exit codes, and errors of one line.

torch and transformers take seconds to import: the actions of the subcommands import them, ``--help`` does not.
"""

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning_compress.cli import export, plan, report, run, sweep, verify

__all__ = ["main"]

DESCRIPTION = """Compress models of transformers on disk, and look at what came out."""
EXIT_CODES = """Exit codes: 0; 1 where something is not as it must be (a refused recipe, a failed check, a job without a
result); 2 for an error, in one line on the standard error; 130 after Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="lightning-compress", description=DESCRIPTION, epilog=EXIT_CODES, formatter_class=raw
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (run, plan, report, verify, export, sweep):
        name, summary = module.__name__.rpartition(".")[2], module.SUMMARY
        subparser = commands.add_parser(name, help=summary, description=module.DESCRIPTION, formatter_class=raw)
        module.add_arguments(subparser)
        subparser.set_defaults(action=module.act)
    options = parser.parse_args(arguments)
    try:
        with _one_line_warnings():
            code: int = options.action(options)
    except (ValueError, OSError) as error:
        print(f"lightning-compress: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lightning-compress: interrupted", file=sys.stderr)
        return 130
    return code


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Inside, a warning is one line without the place in the source that raised it."""

    def show(message: Warning | str, category: type[Warning], *_place: Any) -> None:
        if not issubclass(category, DeprecationWarning | FutureWarning):  # for programmers
            print(f"lightning-compress: warning: {_one_line(message)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _one_line(message: Any) -> str:
    return " ".join(str(message).split())
