"""A figure of the error of each module, in the order of compression. Needs matplotlib (the extra ``plot``)."""

import logging
from pathlib import Path

from lightning_compress.core.ledger import Ledger, Row
from lightning_compress.report.files import whole_file

__all__ = ["error_per_module"]

log = logging.getLogger(__name__)

NAMES_THAT_FIT = 40


def error_per_module(ledger: Ledger, path: str | Path) -> Path | None:
    """Write a PNG: the error of each module on a log scale, a colour for each kind of module.

    Args:
        ledger: Rows without an error are left out.
        path: The file, ``.png``.

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
    figure = Figure(figsize=(min(6 + 0.12 * len(rows), 20), 4.5), layout="constrained")
    axes = figure.add_subplot()
    for kind in dict.fromkeys(map(_kind, rows)):
        points = [(place, row.error) for place, row in enumerate(rows) if _kind(row) == kind]
        axes.plot(*zip(*points, strict=True), "o", markersize=4, label=kind)
    if any(row.error for row in rows):
        axes.set_yscale("log", nonpositive="mask")
    axes.set_ylabel("relative error")
    axes.set_xlabel("module, in order")
    if len(rows) <= NAMES_THAT_FIT:
        axes.set_xticks(range(len(rows)), [row.module for row in rows], rotation=90, fontsize=6)
        axes.set_xlabel("")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=150, metadata={"Software": None})
    return Path(path)


def _kind(row: Row) -> str:
    """The last part of the name that is no number: ``q_proj`` of ``layers.3.q_proj``; with its technique."""
    words = [part for part in row.module.split(".") if not part.isdigit()]
    return f"{words[-1] if words else row.module} ({row.technique})"
