"""The plan of a run: what set-up would do or refuse, the sizes, what the work will take; and its text."""

import io
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

from rich.console import Console

from lightning_compress.report.section import Section, number, print_section, size

__all__ = ["Plan", "PlannedModule"]

WIDTH = 80
NAMED = 3  # modules that are named for each reason


@dataclass(frozen=True)
class PlannedModule:
    """One module that a modifier will work on.

    Args:
        name: Dotted name.
        kind: Its class.
        work: What modifiers claim, such as ``quantize``.
        scheme: Of a quantized module, such as ``W4A16 g128 sym``.
        params: Number of weights.
        bytes_before: Of the dense weight.
        bytes_after: In the export.
        note: Why the weight stays dense on disk; empty where it does not.
    """

    name: str
    kind: str
    work: str
    scheme: str = ""
    params: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """What a recipe will do to a model.

    Args:
        recipe: Names of the modifiers, in order.
        model: Class of the model.
        modules: Those that modifiers will work on.
        left_out: Modules that hold weights and stay as they are, and why.
        refusals: Errors that set-up would raise; where there are any, the fields below are empty.
        warnings: Warnings of set-up.
        bytes_before: Of all tensors of the model.
        bytes_after: Of all tensors of the export; None where a cut decides while it runs.
        bits_per_weight: Mean over quantized modules, scales included; None without any.
        blocks: Blocks that calibration walks through.
        batches: Calibration batches.
        seconds: By phase.
        memory: Bytes by part; ``peak`` is that of the process.
        readers: Who can read the export: an empty string for yes, else the reason why not.
        unknown: What could not be estimated, and why.
    """

    recipe: tuple[str, ...]
    model: str
    modules: tuple[PlannedModule, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    refusals: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    bytes_before: int = 0
    bytes_after: int | None = None
    bits_per_weight: float | None = None
    blocks: int = 0
    batches: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, int] = field(default_factory=dict)
    readers: Mapping[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    def __str__(self) -> str:
        """As the screen shows it, in 80 columns."""
        text = io.StringIO()
        _print(Console(file=text, width=WIDTH), self)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"

    def show(self, file: TextIO | None = None) -> None:
        """Print it to ``file`` (default: the screen), as wide as a terminal is."""
        file = sys.stdout if file is None else file
        if file.isatty():
            _print(Console(file=file), self)
        else:
            print(str(self), end="", file=file)

    def to_json(self) -> dict[str, Any]:
        """The plan in JSON types."""
        plan: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plan


def _print(console: Console, plan: Plan) -> None:
    title = f"plan: {', '.join(plan.recipe)} on {plan.model}"
    if plan.refusals:
        console.print(f"\n{title}: refused", style="bold", markup=False, highlight=False, soft_wrap=True)
        for refusal in plan.refusals:
            console.print(f"\n{refusal}", markup=False, highlight=False)
        return
    for section in (_modules(title, plan), _costs(plan), _readers(plan)):
        if section.rows:
            print_section(console, section)
    console.print()
    for note in _notes(plan):
        console.print(note, markup=False, highlight=False)


def _modules(title: str, plan: Plan) -> Section:
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for module in plan.modules:
        groups.setdefault((module.work, module.scheme, module.kind), []).append(module)
    rows = []
    for names, group in groups.items():
        before, after = sum(m.bytes_before for m in group), sum(m.bytes_after for m in group)
        bits = number(8 * after / max(1, sum(m.params for m in group)))
        rows.append([*names, str(len(group)), bits, size(before), size(after)])
    header = ["work", "scheme", "module", "count", "bits", "before", "after"]
    footer = ["whole model", "", "", "", "", size(plan.bytes_before), size(plan.bytes_after) or "unknown"]
    return Section(title, header, rows, footer, words=("work", "scheme", "module"))


def _costs(plan: Plan) -> Section:
    rows = [[f"seconds of {phase}", number(value, digits=3)] for phase, value in plan.seconds.items()]
    rows += [[f"memory, {part}", size(value)] for part, value in plan.memory.items()]
    walk = f"{plan.batches} batches, {plan.blocks} blocks" if plan.batches else "no calibration data"
    return Section(f"estimated on this machine ({walk})", ["what", "estimate"], rows, words=("what",))


def _readers(plan: Plan) -> Section:
    rows = [[reader, "yes" if not fault else f"no: {fault}"] for reader, fault in plan.readers.items()]
    return Section("who can read the export", ["reader", "reads it"], rows, words=("reader", "reads it"))


def _notes(plan: Plan) -> list[str]:
    notes = [_named(f"left as they are, {why}", names) for why, names in _by_reason(plan.left_out).items()]
    dense = {module.name: module.note for module in plan.modules if module.note}
    notes += [_named(f"quantized, and written dense, since {why}", names) for why, names in _by_reason(dense).items()]
    notes += [f"not estimated: {what}" for what in plan.unknown]
    return notes + [f"warning: {text}" for text in plan.warnings]


def _by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, why in reasons.items():
        groups.setdefault(why, []).append(name)
    return groups


def _named(text: str, names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{text}: {', '.join(names[:NAMED])}{more}"
