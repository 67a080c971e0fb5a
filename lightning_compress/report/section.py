"""One table on the screen, and numbers and sizes as the reports write them.

Figures are never broken; words fold where there is no room.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["Section", "number", "print_section", "size"]

STACKED = ("median error", "worst error")  # headers in two lines
WORDS = ("metric", "module", "technique", "scheme", "flags")  # columns that are not figures


@dataclass(frozen=True)
class Section:
    """One table; cells are text already. ``words``: headers of the columns that are not figures."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    footer: Sequence[str] = ()
    words: Sequence[str] = WORDS


def print_section(console: Console, section: Section) -> None:
    """Print the title and the table."""
    table = Table(
        box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, show_footer=bool(section.footer)
    )  # fmt: skip
    for place, name in enumerate(section.header):
        words = name in section.words
        table.add_column(
            "\n".join(name.split()) if name in STACKED else name,
            section.footer[place] if section.footer else "",
            justify="left" if words else "right",
            overflow="fold",
            no_wrap=not words,
            min_width=min(40, max((len(row[0]) for row in section.rows), default=1)) if name == "module" else None,
        )
    for row in section.rows:
        table.add_row(*map(Text, row))  # a str would be read as markup: [smoothquant,gptq_w8a8] vanished
    console.print(f"\n{section.title}", style="bold", markup=False, highlight=False, soft_wrap=True)
    console.print(table)


def number(value: Any, sign: str = "", digits: int = 4) -> str:
    """Text of a number; empty for None."""
    return "" if value is None else format(value, f"{sign}.{digits}g") if isinstance(value, int | float) else str(value)


def size(value: float | None) -> str:
    """Bytes, in powers of 1024; empty for None."""
    if value is None:
        return ""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.4g} {units[0]}"
