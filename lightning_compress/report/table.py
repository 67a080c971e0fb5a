"""The run on one screen: metric before and after, each technique with its totals, the worst modules, what was flagged.

Tables fit 80 columns, figures are never broken: names of techniques, schemes and modules fold where there is no room.
"""

import io
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, TextIO

from rich.console import Console

from lightning_compress.core.ledger import Ledger, Row
from lightning_compress.report.section import Section, number, print_section, size
from lightning_compress.report.summary import headline, metric_change, totals

__all__ = ["notes", "render", "sections", "show"]

WORST = 5  # modules with the largest error that are shown one by one
NAMED = 3  # modules that are named for each flag
SHORT = 0.01  # seconds; a phase below is not worth a figure
WIDTH = 80  # columns of a log
NUMBER = re.compile(r"-?\d+(\.\d+)?")


def render(ledger: Ledger, facts: Mapping[str, Any], width: int = WIDTH) -> str:
    """The report as plain text, lines ending where their text ends. ``facts`` as in report/summary.py."""
    text = io.StringIO()
    _print(Console(file=text, width=width), ledger, facts)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def show(ledger: Ledger, facts: Mapping[str, Any], file: TextIO | None = None) -> None:
    """Print the report to ``file`` (default: the screen), as wide as a terminal is."""
    file = sys.stdout if file is None else file
    if file.isatty():
        _print(Console(file=file), ledger, facts)
    else:
        print(render(ledger, facts), end="", file=file)


def _print(console: Console, ledger: Ledger, facts: Mapping[str, Any]) -> None:
    for section in sections(ledger, facts):
        print_section(console, section)
    console.print()
    for note in notes(ledger, facts):
        console.print(note, markup=False, highlight=False, soft_wrap=not note.startswith("seconds"))  # paths stay whole


def sections(ledger: Ledger, facts: Mapping[str, Any]) -> list[Section]:
    """The tables that have rows."""
    tables = [_metrics(facts), _techniques(ledger), _worst(ledger), _plan_and_fact(facts)]
    return [table for table in tables if table.rows]


def _metrics(facts: Mapping[str, Any]) -> Section:
    """With what was measured before training began to compress, where it did."""
    dense = facts.get("metric_dense") or {"step": None, "values": {}}
    rows = []
    for name, entry in (facts.get("metric") or {}).items():
        before, after = entry.get("before"), entry.get("after")
        error = entry.get("standard_error")
        paired = number(metric_change(entry), "+") + ("" if error is None else f" ± {number(error, digits=2)}")
        first = [number(dense["values"].get(name), digits=6)] if dense["values"] else []
        rows.append([name, *first, number(before, digits=6), number(after, digits=6), paired])
    figures = ["before", "after", "difference ± standard error"]
    if dense["values"]:
        figures = [f"dense, step {dense['step']}", "trained", "after", "after - trained"]
    return Section(headline(facts) or "metric", ["metric", *figures], rows)


def _techniques(ledger: Ledger) -> Section:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in ledger:
        groups.setdefault((row.technique, row.scheme or ""), []).append(row)
    header = ["technique", "scheme", "modules", "bits", "before", "after", "median error", "worst error"]
    rows = [[*name, *_aggregate(group)] for name, group in groups.items()]
    sums = totals(ledger)
    footer = [
        "total", "", str(sums["modules"]), number(sums["bits_per_weight"]), size(sums["bytes_before"]),
        size(sums["bytes_after"]), "", "",
    ] if len(rows) > 1 else []  # fmt: skip
    return Section("modules, bits per weight, sizes of their weights, errors of their outputs", header, rows, footer)


def _aggregate(rows: Sequence[Row]) -> list[str]:
    """One technique with one scheme, from ``modules`` on."""
    errors = [row.error for row in rows if row.error is not None]
    weighed = [(row.bits * row.params, row.params) for row in rows if row.bits is not None and row.params]
    return [
        str(len(rows)),
        number(sum(b for b, _ in weighed) / sum(p for _, p in weighed) if weighed else None),
        size(_sum(row.bytes_before for row in rows)),
        size(_sum(row.bytes_after for row in rows)),
        number(median(errors) if errors else None, digits=3),
        number(max(errors, default=None), digits=3),
    ]


def _worst(ledger: Ledger) -> Section:
    ranked = sorted((row for row in ledger if row.error is not None), key=lambda row: -(row.error or 0))[:WORST]
    rows = [[row.module, row.technique, number(row.error), number(row.sqnr_db), "; ".join(row.flags)] for row in ranked]
    title = "largest errors, |(W - Q) X|² / |W X|² (without data |W - Q|² / |W|²)"
    return Section(title, ["module", "technique", "error", "SQNR dB", "flags"], rows)


def _plan_and_fact(facts: Mapping[str, Any]) -> Section:
    """Where the run was planned: estimates beside what was measured."""
    plan, spent = facts.get("plan") or {}, facts.get("seconds") or {}
    seconds = plan.get("seconds", {})
    pairs = [
        ("bytes of the export", plan.get("bytes_after"), facts.get("model_bytes_after"), size),
        ("peak memory", plan.get("memory", {}).get("peak"), facts.get("peak_memory_bytes"), size),
        *((f"seconds of {phase}", value, spent.get(phase), number) for phase, value in seconds.items()),
    ]
    rows = [
        [name, text(planned), text(fact), f"{100 * (planned / fact - 1):+.0f} %"]
        for name, planned, fact, text in pairs
        if planned and fact
    ]
    return Section("plan and fact", ["what", "plan", "fact", "difference"], rows, words=("what",))


def notes(ledger: Ledger, facts: Mapping[str, Any]) -> list[str]:
    """Lines below the tables: the gate, promotion, blocks, flags, zeros, sizes, seconds, memory."""
    lines = [*_gates(facts), *_blocks(ledger)]
    for flag, modules in _flags(ledger).items():
        more = f" and {len(modules) - NAMED} more" if len(modules) > NAMED else ""
        lines.append(f"{flag}: {', '.join(modules[:NAMED])}{more}")
    if (share := totals(ledger)["sparsity"]) is not None:
        pruned = {row.module for row in ledger if row.sparsity is not None}
        lines.append(f"zeros: {number(100 * share, digits=3)} % of the weights of {len(pruned)} pruned modules")
    if facts.get("model_bytes_before") and facts.get("model_bytes_after"):
        where = " on disk" if facts.get("export_dir") else ""
        sizes = f"{size(facts['model_bytes_before'])} -> {size(facts['model_bytes_after'])}{where}"
        lines.append(f"model with all its weights: {sizes}")
    if seconds := facts.get("seconds"):
        long = {phase: spent for phase, spent in seconds.items() if spent >= SHORT}
        lines.append("seconds: " + ", ".join(f"{phase} {number(spent)}" for phase, spent in long.items()))
    if (peak := facts.get("peak_memory_bytes")) is not None:
        lines.append(f"peak memory: {size(peak)}")
    if (folder := facts.get("export_dir")) is not None:
        lines.append(f"compressed model: {folder}")
    return lines


def _blocks(ledger: Ledger) -> list[str]:
    """The last block, and the one with the largest error where that is another one."""
    if not ledger.blocks:
        return []
    last = next(reversed(ledger.blocks))
    worst = max(ledger.blocks, key=lambda name: ledger.blocks[name]["error"])
    lines = ["outputs of blocks against the dense model's, |y - d|² / |d|²:"]
    for name in dict.fromkeys([worst, last]):
        facts = ledger.blocks[name]
        error = f" ± {number(facts['standard_error'], digits=2)}" if "standard_error" in facts else ""
        lines.append(f"  {name} {number(facts['error'])}{error}{' (largest)' if name == worst != last else ''}")
    return lines


def _gates(facts: Mapping[str, Any]) -> list[str]:
    """The gates, and the rounds of promotion that led there."""
    rounds = facts.get("promotion") or ()
    lines = [f"promotion, round {r['round']}: {len(r['promoted'])} modules; {'; '.join(r['gates'])}" for r in rounds]
    return [*lines, *(f"gate: {entry['text']}" for entry in facts.get("gate") or ())]


def _flags(ledger: Ledger) -> dict[str, list[str]]:
    """The modules of each flag; flags that differ in the number at their end alone are one, from least to largest."""
    alike: dict[str, list[tuple[str, str, list[str]]]] = {}
    for flag, modules in totals(ledger)["flags"].items():
        text, _, end = flag.rpartition(" ")
        alike.setdefault(text if NUMBER.fullmatch(end) else flag, []).append((flag, end, modules))
    flags = {}
    for text, entries in alike.items():
        ends = sorted((end for _, end, _ in entries), key=float) if len(entries) > 1 else []
        name = f"{text} {ends[0]} to {ends[-1]}" if ends else entries[0][0]
        flags[name] = [module for _, _, modules in entries for module in modules]
    return flags


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
