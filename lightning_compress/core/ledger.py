"""What was done to each module: rows of facts that modifiers report and that the report prints.

A row belongs to one module and one technique; facts that arrive later for the same pair are merged into it.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

__all__ = ["Ledger", "Row"]


@dataclass
class Row:
    """Facts on one module. None means: does not apply, or was not measured.

    Args:
        module: Dotted name inside the compressed model.
        technique: Name of the technique, such as ``gptq``.
        scheme: The format, such as ``W4A16 g128``.
        error: Relative error of the module's output, ||(W - Q) X||^2 / ||W X||^2; with no data, of the weight.
        sqnr_db: Signal to quantization noise of the weight, 10 log10(||W||^2 / ||W - Q||^2), in dB.
        bits: Bits per weight as stored, scales included.
        sparsity: Share of weights that are zero.
        params: Number of weights.
        bytes_before: Size of the dense weight in bytes.
        bytes_after: Size as exported, in bytes.
        seconds: Time spent on this module.
        tokens: Calibration tokens (rows of X) that it saw.
        flags: Remarks such as ``never saw data`` or ``fell back to rounding``.
    """

    module: str
    technique: str
    scheme: str | None = None
    error: float | None = None
    sqnr_db: float | None = None
    bits: float | None = None
    sparsity: float | None = None
    params: int | None = None
    bytes_before: int | None = None
    bytes_after: int | None = None
    seconds: float | None = None
    tokens: int | None = None
    flags: list[str] = field(default_factory=list)


class Ledger:
    """Rows in the order in which modules were first reported.

    Attributes:
        files: Texts for the report's folder, by name.
        blocks: By block how far its output is from the dense model's: ``error``, the mean over ``rows`` of
            |y - d|^2 / |d|^2, and its ``standard_error`` (calibration/divergence.py). Empty where no data was used.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], Row] = {}
        self.files: dict[str, str] = {}
        self.blocks: dict[str, dict[str, float]] = {}

    def add(self, module: str, technique: str, *, flag: str | None = None, **facts: Any) -> Row:
        """Record facts; ``flag`` adds one remark. TypeError on a fact that :class:`Row` does not know."""
        row = replace(self._rows.get((module, technique), Row(module, technique)), **facts)
        self._rows[module, technique] = row
        if flag is not None and flag not in row.flags:
            row.flags.append(flag)
        return row

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self._rows)

    def put(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take rows as :meth:`state_dict` gave them, in place of those of the same modules and techniques."""
        self._rows |= {(row["module"], row["technique"]): Row(**row) for row in rows}

    def state_dict(self) -> list[dict[str, Any]]:
        """Primitives only, so that it survives ``weights_only`` loading."""
        return [asdict(row) for row in self.rows]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        self._rows = {(r["module"], r["technique"]): Row(**r) for r in state}
