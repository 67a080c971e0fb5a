"""The run on one screen: metric before and after, each technique with its totals, the worst modules, what was flagged.

The same cells go through rich, where it is installed and the output is a terminal, or into plain text.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TextIO

from lightning_compress.core.ledger import Ledger, Row
from lightning_compress.report.summary import totals

__all__ = ["render", "show"]

WORST = 5              # modules with the largest error that are shown one by one
NAMED = 3              # modules that are named for each flag
WORDS = ("metric", "module", "technique", "scheme", "flags")        # columns that are no figures


@dataclass(frozen=True)
class Section:
    """One table; cells are text already."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    footer: Sequence[str] = ()


def render(ledger: Ledger, facts: Mapping[str, Any]) -> str:
    """The report as plain text, lines ending where their text ends. ``facts`` as in report/summary.py."""
    return "\n".join(_lines(_sections(ledger, facts), _notes(ledger, facts))) + "\n"


def show(ledger: Ledger, facts: Mapping[str, Any], file: TextIO | None = None) -> None:
    """Print the report to ``file`` (default: the screen)."""
    file = sys.stdout if file is None else file
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(render(ledger, facts), end="", file=file)
        return
    if not file.isatty():                     # a log: rich would cut lines to 80 columns
        print(render(ledger, facts), end="", file=file)
        return
    console = Console(file=file)
    for section in _sections(ledger, facts):
        table = Table(title=section.title, title_justify="left", title_style="bold", show_footer=bool(section.footer))
        for number, name in enumerate(section.header):
            foot = section.footer[number] if section.footer else ""
            table.add_column(name, foot, justify="left" if name in WORDS else "right", overflow="fold")
        for row in section.rows:
            table.add_row(*row)
        console.print(table)
    for note in _notes(ledger, facts):
        console.print(note, markup=False, highlight=False)


def _sections(ledger: Ledger, facts: Mapping[str, Any]) -> list[Section]:
    found = [_metrics(facts), _techniques(ledger), _worst(ledger)]
    return [section for section in found if section.rows]


def _metrics(facts: Mapping[str, Any]) -> Section:
    rows = []
    for name, entry in (facts.get("metric") or {}).items():
        before, after = entry.get("before"), entry.get("after")
        change = entry.get("difference")
        if change is None and before is not None and after is not None:
            change = after - before
        error = entry.get("standard_error")
        paired = _number(change, "+") + ("" if error is None else f" ± {_number(error, digits=2)}")
        rows.append([name, _number(before, digits=6), _number(after, digits=6), paired])
    what = " of ".join(str(facts[key]) for key in ("recipe", "model") if isinstance(facts.get(key), str))
    return Section(what or "metric", ["metric", "before", "after", "difference ± standard error"], rows)


def _techniques(ledger: Ledger) -> Section:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in ledger:
        groups.setdefault((row.technique, row.scheme or ""), []).append(row)
    header = ["technique", "scheme", "modules", "weights", "bits/weight", "before", "after", "median error",
              "worst error", "seconds"]  # fmt: skip
    rows = [[*name, *_aggregate(group)] for name, group in groups.items()]
    whole = totals(ledger)
    bits, seconds = whole["bits_per_weight"], _sum(row.seconds for row in ledger)
    footer = [
        "total", "", str(whole["modules"]), _count(whole["params"]), _number(bits), _size(whole["bytes_before"]),
        _size(whole["bytes_after"]), "", "", _number(seconds),
    ] if len(rows) > 1 else []  # fmt: skip
    return Section("modules", header, rows, footer)


def _aggregate(rows: Sequence[Row]) -> list[str]:
    """One technique with one scheme, from ``modules`` on."""
    errors = [row.error for row in rows if row.error is not None]
    weighed = [(row.bits * row.params, row.params) for row in rows if row.bits is not None and row.params]
    return [
        str(len(rows)),
        _count(_sum(row.params for row in rows)),
        _number(sum(b for b, _ in weighed) / sum(p for _, p in weighed) if weighed else None),
        _size(_sum(row.bytes_before for row in rows)),
        _size(_sum(row.bytes_after for row in rows)),
        _number(median(errors) if errors else None),
        _number(max(errors, default=None)),
        _number(_sum(row.seconds for row in rows)),
    ]


def _worst(ledger: Ledger) -> Section:
    ranked = sorted((row for row in ledger if row.error is not None), key=lambda row: -(row.error or 0))[:WORST]
    rows = [
        [row.module, row.technique, _number(row.error), _number(row.sqnr_db), "; ".join(row.flags)] for row in ranked
    ]
    return Section("largest errors", ["module", "technique", "error", "SQNR dB", "flags"], rows)


def _notes(ledger: Ledger, facts: Mapping[str, Any]) -> list[str]:
    notes = []
    for flag, modules in totals(ledger)["flags"].items():
        more = f" and {len(modules) - NAMED} more" if len(modules) > NAMED else ""
        notes.append(f"{flag}: {', '.join(modules[:NAMED])}{more}")
    if facts.get("model_bytes_before") and facts.get("model_bytes_after"):
        notes.append(f"whole model: {_size(facts['model_bytes_before'])} -> {_size(facts['model_bytes_after'])}")
    if seconds := facts.get("seconds"):
        notes.append("seconds: " + ", ".join(f"{phase} {_number(spent)}" for phase, spent in seconds.items()))
    if (peak := facts.get("peak_memory_bytes")) is not None:
        notes.append(f"peak memory: {_size(peak)}")
    if (folder := facts.get("export_dir")) is not None:
        notes.append(f"compressed model: {folder}")
    return notes


# -- plain text -------------------------------------------------------------------------------------------------------


def _lines(sections: Iterable[Section], notes: Sequence[str]) -> list[str]:
    lines: list[str] = []
    for section in sections:
        table = [section.header, *section.rows, *([section.footer] if section.footer else [])]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines += ["", section.title]
        for number, row in enumerate(table):
            if number == 1 or (section.footer and number == len(table) - 1):
                lines.append("  ".join("-" * width for width in widths))
            cells = zip(section.header, row, widths, strict=True)
            lines.append("  ".join(c.ljust(w) if name in WORDS else c.rjust(w) for name, c, w in cells).rstrip())
    return [*lines, "", *notes] if notes else lines


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _number(value: Any, sign: str = "", digits: int = 4) -> str:
    return "" if value is None else format(value, f"{sign}.{digits}g") if isinstance(value, int | float) else str(value)


def _count(value: float | None) -> str:
    """1,234,567 as 1.235 M."""
    return _scaled(value, 1000, ("", " K", " M", " G", " T"))


def _size(value: float | None) -> str:
    """Bytes, in powers of 1024."""
    return _scaled(value, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def _scaled(value: float | None, step: int, units: Sequence[str]) -> str:
    if value is None:
        return ""
    power = 0
    while abs(value) >= step and power < len(units) - 1:
        value, power = value / step, power + 1
    return f"{value:.4g}{units[power]}"
