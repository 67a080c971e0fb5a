"""A figure of the error of each module, in the order of compression. Needs matplotlib (the extra ``plot``)."""

import logging
from collections.abc import Sequence
from pathlib import Path

from lightning_compress.core.ledger import Ledger, Row
from lightning_compress.files.atomic_file import whole_file

__all__ = ["error_per_module"]

log = logging.getLogger(__name__)

NAMES_THAT_FIT = 40


def error_per_module(ledger: Ledger, path: str | Path, title: str | None = None) -> Path | None:
    """Write a PNG: the error of each module on a log scale, a colour for each kind of module.

    Up to 40 modules are named on the axis; of more, the repeated blocks (``layers.7``) are.

    Args:
        ledger: Rows without an error are left out.
        path: The file, ``.png``.
        title: What was compressed and how, such as ``gptq_w4 of LlamaForCausalLM``.

    Returns:
        The path; None where there is nothing to draw, or no matplotlib (a one-line note says which).
    """
    rows = [row for row in ledger if row.error is not None]
    if not rows:
        log.info("no figure of errors: no module has one")
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.warning("no figure of errors: matplotlib is missing; pip install 'lightning-compress[plot]'")
        return None
    figure = Figure(figsize=(min(6 + 0.06 * len(rows), 14), 5), layout="constrained")
    axes = figure.add_subplot()
    kinds = list(dict.fromkeys(map(_kind, rows)))
    for kind in kinds:
        points = [(place, row.error) for place, row in enumerate(rows) if _kind(row) == kind]
        axes.plot(*zip(*points, strict=True), "o", markersize=4, label=kind)
    if any(row.error for row in rows):
        axes.set_yscale("log", nonpositive="mask")
    axes.set_title(title or "error of each module", fontsize=10)
    axes.set_ylabel("relative error |(W - Q) X|² / |W X|²")
    if len(rows) <= NAMES_THAT_FIT:
        axes.set_xticks(range(len(rows)), [row.module for row in rows], rotation=90, fontsize=7)
    else:
        places = _block_starts(rows)
        shown = places[:: max(1, round(len(places) / NAMES_THAT_FIT))]
        axes.set_xticks([place for place, _ in shown], [name for _, name in shown], rotation=90, fontsize=7)
        axes.grid(axis="x", alpha=0.2)
    axes.grid(axis="y", alpha=0.3)
    if 1 < len(kinds) < len(rows):  # else the names on the axis say the same
        figure.legend(loc="outside lower center", fontsize=8, ncols=min(len(kinds), 4))
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=150, metadata={"Software": None})
    return Path(path)


def _block_starts(rows: Sequence[Row]) -> list[tuple[int, str]]:
    """(place, name) of the first module of each repeated block, ``layers.7`` of ``model.layers.7.mlp.up_proj``."""
    starts: dict[str, int] = {}
    for place, row in enumerate(rows):
        parts = row.module.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        starts.setdefault(row.module if number is None else ".".join(parts[max(0, number - 1) : number + 1]), place)
    return [(place, name) for name, place in starts.items()]


def _kind(row: Row) -> str:
    """The last part of the name that is not a number: ``q_proj`` of ``layers.3.q_proj``; with its technique."""
    words = [part for part in row.module.split(".") if not part.isdigit()]
    return f"{words[-1] if words else row.module} ({row.technique})"
