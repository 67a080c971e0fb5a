"""A report read back from its folder: what ``summary.write`` wrote."""

import csv
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from lightning_compress.core.ledger import Ledger, Row

__all__ = ["read_report"]


def read_report(folder: Path) -> tuple[Ledger, dict[str, Any]]:
    """The ledger in ``modules.csv``, and the facts in ``summary.json``.

    Raises:
        ValueError: A file is missing, or is not one of a report; the message names it.
    """
    summary, modules = folder / "summary.json", folder / "modules.csv"
    if missing := [path.name for path in (summary, modules) if not path.is_file()]:
        raise ValueError(f"{folder} has no {missing[0]}; expected the folder of a report, or of a run")
    try:
        facts = json.loads(summary.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{summary} cannot be read as JSON: {error}") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{summary} holds a {type(facts).__name__}, expected an object")
    ledger = Ledger()
    try:
        with modules.open(encoding="utf-8", newline="") as file:
            ledger.load_state_dict([_row(line) for line in csv.DictReader(file)])
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(f"{modules} is not a table of modules: {type(error).__name__}: {error}") from error
    return ledger, facts


def _row(line: dict[str, str]) -> dict[str, Any]:
    """Values of their types; an empty cell is None."""
    kinds = {field.name: str(field.type) for field in fields(Row)}
    return {name: _value(text, kinds[name]) for name, text in line.items()}


def _value(text: str, kind: str) -> Any:
    if kind.startswith("list"):
        return text.split("; ") if text else []
    if "int" in kind or "float" in kind:
        return (int if "int" in kind else float)(text) if text else None
    return text or None
