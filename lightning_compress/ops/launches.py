"""Launch configurations that were measured: a table for each op, a JSON file beside its kernel; else the op's rule.

    {GPU: [{"at": {shape}, "launch": {fields of the op's Launch}, "us": .., "rule_us": .., "triton": ".."}]}

An entry holds for the shape that it names, and for smaller ones in the one size that varies from call to call, such as
the tokens of a product: of the entries that agree in all else the one with the smallest such size that is large enough.
``benchmarks/tune_ops.py`` (make tune-gpu) writes the tables; nothing is tuned when a kernel is imported or called.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

__all__ = ["LaunchTable"]

L = TypeVar("L")
Shape = Mapping[str, Any]
FACTS = ("us", "rule_us", "triton")  # of an entry, beside its shape and its launch


class LaunchTable(Generic[L]):
    """The measured launches of one op.

    Args:
        path: The JSON file.
        launch: Frozen dataclass of ints and bools.
        exact: Names of what a shape must agree in.
        at_most: Name of the size that an entry bounds.
    """

    def __init__(self, path: Path, launch: type[L], exact: Sequence[str], at_most: str):
        self.path, self.launch, self.exact, self.at_most = path, launch, tuple(exact), at_most

    def find(self, gpu: str, shape: Shape) -> L | None:
        """The launch for a shape on a GPU, by its name; None where nothing was measured."""
        for bound, launch in self._sorted.get((gpu, *(shape[name] for name in self.exact)), ()):
            if shape[self.at_most] <= bound:
                return launch
        return None

    def read(self) -> dict[str, list[dict[str, Any]]]:
        """The entries by GPU.

        Raises:
            ValueError: An entry is not of the form above; the message names the file, the GPU and the entry.
        """
        entries: dict[str, list[dict[str, Any]]] = json.loads(self.path.read_text("utf-8"))
        if not isinstance(entries, dict) or not all(isinstance(rows, list) for rows in entries.values()):
            raise ValueError(f"{self.path.name} of {self.path.parent.name}: expected {{GPU: [entries]}}; tune it anew")
        for gpu, rows in entries.items():
            seen = set()
            for row in rows:
                fault = self._fault(row)
                if fault is None and (key := tuple(sorted(row["at"].items()))) in seen:
                    fault = "this shape comes twice"
                if fault is not None:
                    raise ValueError(
                        f"{self.path.name} of {self.path.parent.name}, {gpu}, entry {row}: {fault}; take it out, and "
                        f"tune the shape anew"
                    )
                seen.add(key)
        return entries

    def write(self, gpu: str, entries: Sequence[Mapping[str, Any]]) -> None:
        """Put entries into the file, in place of those of the same shape; all others stay.

        Raises:
            ValueError: As :meth:`read`; the file stays as it was.
        """
        table = self.read()
        new = [dict(row) for row in entries]
        shapes = [row.get("at") for row in new]
        kept = [row for row in table.get(gpu, []) if row["at"] not in shapes]
        for row in new:
            if (fault := self._fault(row)) is not None:
                raise ValueError(f"cannot write entry {row}: {fault}")
        names = (*self.exact, self.at_most)
        table[gpu] = sorted(kept + new, key=lambda row: [row["at"][name] for name in names])
        lines = [
            f"  {json.dumps(name)}: [\n" + ",\n".join(f"    {json.dumps(row)}" for row in rows) + "\n  ]"
            for name, rows in sorted(table.items())
        ]
        self.path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        self.__dict__.pop("_sorted", None)

    def launch_of(self, entry: Mapping[str, Any]) -> L:
        """The launch of an entry."""
        return self.launch(**entry["launch"])

    @cached_property
    def _sorted(self) -> dict[tuple[Any, ...], list[tuple[int, L]]]:
        found: dict[tuple[Any, ...], list[tuple[int, L]]] = {}
        for gpu, rows in self.read().items():
            for row in rows:
                key = (gpu, *(row["at"][name] for name in self.exact))
                found.setdefault(key, []).append((row["at"][self.at_most], self.launch_of(row)))
        return {key: sorted(rows, key=lambda row: row[0]) for key, rows in found.items()}

    def _fault(self, row: Any) -> str | None:
        """What is wrong with an entry."""
        if not isinstance(row, dict) or not isinstance(row.get("at"), dict) or not isinstance(row.get("launch"), dict):
            return 'expected "at" and "launch"'
        if unknown := row.keys() - {"at", "launch", *FACTS}:
            return f"unknown: {', '.join(sorted(unknown))}"
        if row["at"].keys() != {*self.exact, self.at_most}:
            return f'expected the sizes {", ".join([*self.exact, self.at_most])} in "at"'
        fields = dataclasses.fields(self.launch)  # type: ignore[arg-type]
        types: dict[str, Any] = {field.name: field.type for field in fields}
        if row["launch"].keys() != types.keys():
            return f'expected the fields {", ".join(types)} in "launch"'
        for name, value in row["launch"].items():
            if type(value) is not types[name]:
                return f"{name} must be {types[name].__name__}, got {value!r}"
            if type(value) is int and value < 1:
                return f"{name} must be 1 at least, got {value}"
        if type(row["at"][self.at_most]) is not int or row["at"][self.at_most] < 1:
            return f"{self.at_most} must be an integer, 1 at least"
        return None
