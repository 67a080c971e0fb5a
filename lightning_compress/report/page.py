"""``index.html``: the run on one page, in one file that needs nothing from elsewhere, on a desk or a phone.

It shows the tables of report/table.py, how far each block is from the dense model, what each module lost, the override
that would give one more bits or leave it dense, recipe and versions.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, Template, select_autoescape

from lightning_compress.core.ledger import Ledger, Row
from lightning_compress.files.atomic_file import whole_file
from lightning_compress.report.charts import Chart, Value, chart
from lightning_compress.report.section import number, size
from lightning_compress.report.summary import headline, installed_versions, metric_change, totals
from lightning_compress.report.table import notes, sections

__all__ = ["template", "write"]

DECADES = 6  # errors this far below the largest have the shortest bar
SCHEME = re.compile(r"W(?P<weights>\d+)A(?P<inputs>\d+) ")
TOGETHER = 3  # modules that one override gives more bits
SHOWN = 12  # modules with the largest errors that are shown at once; a click shows all


@dataclass(frozen=True)
class Card:
    """A figure at the top."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Bar:
    """One module: its error, a bar on a log scale, how to give it more bits, and how to leave it dense."""

    module: str
    technique: str
    error: str
    width: float
    more_bits: str
    leave_dense: str


def write(folder: str | Path, ledger: Ledger, facts: Mapping[str, Any]) -> None:
    """Write ``index.html`` into ``folder``; it is there whole or not at all.

    Args:
        folder: Made if it is missing.
        ledger: What was done to each module.
        facts: As in report/summary.py.
    """
    bars = _bars(ledger, facts)
    worst = sorted(bars, key=lambda bar: -bar.width)[:SHOWN]
    text = template("page.html.jinja").render(
        title=_title(ledger, facts),
        metric_title=headline(facts),
        cards=_cards(ledger, facts),
        sections=[table for table in sections(ledger, facts) if not table.title.startswith("largest errors")],
        divergence=_divergence(ledger),
        rows=_plain_range(int(facts["rows"]) for facts in ledger.blocks.values()),
        blocks=[(n, number(f["error"]), number(f.get("standard_error"), digits=2)) for n, f in ledger.blocks.items()],
        worst=worst,
        together=_together(ledger, facts),
        bars=bars if len(bars) > len(worst) else [],
        notes=notes(ledger, facts),
        recipe=json.dumps(facts.get("modifiers") or facts.get("recipe"), indent=2, default=str),
        versions=facts.get("versions") or installed_versions(),
    )
    with whole_file(Path(folder) / "index.html") as path:
        path.write_text(text, encoding="utf-8")


def template(name: str) -> Template:
    """A template of this folder."""
    environment = Environment(
        loader=PackageLoader("lightning_compress.report", ""), autoescape=select_autoescape(default=True),
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(name)


def _title(ledger: Ledger, facts: Mapping[str, Any]) -> str:
    """As the headline; where the recipe has no name, its techniques: ``gptq of LlamaForCausalLM``."""
    text = headline(facts)
    if isinstance(facts.get("recipe"), str) or not len(ledger):
        return text or "compression"
    techniques = ", ".join(dict.fromkeys(row.technique for row in ledger))
    return f"{techniques} of {text}" if text else techniques


def _divergence(ledger: Ledger) -> Chart | None:
    """A chart of the error of each block, in the order of the model."""
    values = [
        Value(f"{name}: {number(facts['error'])}", float(place), facts["error"], facts.get("standard_error", 0.0))
        for place, (name, facts) in enumerate(ledger.blocks.items())
        if math.isfinite(facts["error"])
    ]
    if not values:
        return None
    names = {float(place): _last_part(name) for place, name in enumerate(ledger.blocks)}
    return chart("error of each block", values, "block", "error", x_names=names)


def _last_part(name: str) -> str:
    """``3`` of ``model.layers.3``."""
    return name.rpartition(".")[2]


def _plain_range(numbers: Iterable[int]) -> str:
    """``8``, or ``6 to 8``; empty for no number."""
    ordered = sorted(set(numbers))
    return " to ".join(str(n) for n in dict.fromkeys([ordered[0], ordered[-1]])) if ordered else ""


def _cards(ledger: Ledger, facts: Mapping[str, Any]) -> list[Card]:
    cards = []
    before, after = facts.get("model_bytes_before"), facts.get("model_bytes_after")
    if before and after:
        cards.append(Card("size", size(after), f"of {size(before)}, {before / after:.2f} times smaller"))
    for name, entry in (facts.get("metric") or {}).items():
        error = entry.get("standard_error")
        spread = "" if error is None else f" ± {number(error, digits=2)}"
        note = f"before {number(entry.get('before'))}, change {number(metric_change(entry), '+', 3)}{spread}"
        cards.append(Card(name, number(entry.get("after")), note))
    if (bits := totals(ledger)["bits_per_weight"]) is not None:
        cards.append(Card("bits per weight", number(bits, digits=3), "of quantized modules, scales included"))
    if seconds := facts.get("seconds"):
        cards.append(Card("seconds", number(sum(seconds.values()), digits=3), "without training"))
    return cards


def _bars(ledger: Ledger, facts: Mapping[str, Any]) -> list[Bar]:
    rows = [row for row in ledger if row.error is not None]
    largest = max((row.error or 0 for row in rows), default=0)
    return [
        Bar(
            row.module, row.technique, number(row.error), _width(row, largest),
            *(text(row, facts).replace("MODULE", row.module) for text in (_more_bits, _leave_dense)),
        )
        for row in rows
    ]  # fmt: skip


def _together(ledger: Ledger, facts: Mapping[str, Any]) -> str:
    """The override that gives 8 bits to the modules with the largest errors, of the technique of the first of them."""
    rows = sorted((row for row in ledger if row.error is not None), key=lambda row: -(row.error or 0))
    texts = [(row.module, text) for row in rows if (text := _more_bits(row, facts)).startswith("'")]
    names = [module for module, text in texts if text == texts[0][1]][:TOGETHER]
    return texts[0][1].replace("MODULE", ",".join(names)) if len(names) > 1 else ""


def _width(row: Row, largest: float) -> float:
    """Percent of the full width."""
    if not row.error or not math.isfinite(row.error) or not math.isfinite(largest):
        return 0.0
    return round(100 * max(0.02, 1 + math.log10(row.error / largest) / DECADES), 1)


def _leave_dense(row: Row, facts: Mapping[str, Any]) -> str:
    text: str = (facts.get("leave_dense") or {}).get(row.technique, "")
    return text


def _more_bits(row: Row, facts: Mapping[str, Any]) -> str:
    """Empty where the weights have 8 bits already, or are no integers."""
    scheme = SCHEME.match(row.scheme or "")
    if scheme is None or int(scheme["weights"]) >= 8:
        return ""
    text: str = (facts.get("more_bits") or {}).get(row.technique, {}).get(scheme["inputs"], "")
    return text
