"""Launches of kernels: the device they run on, and measured configurations, a JSON file for each op.

Triton launches on the current device, whatever the device of its arguments: every launch is made inside
:func:`launching`. A shape without a measured configuration uses the op's rule.

    {GPU: [{"at": {shape}, "launch": {fields of the op's launch}, "us": .., "rule_us": .., "triton": ".."}]}

An entry applies to its shape, and to shapes that are smaller in the one size that varies from call to call, such as the
number of tokens of a product: of the entries that agree in all other sizes, the one with the smallest sufficient size
is used.
``benchmarks/tune_ops.py`` (make tune-gpu) writes the tables; nothing is tuned when a kernel is imported or called.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["LaunchTable", "launching"]

L = TypeVar("L")
Shape = Mapping[str, Any]
MEASUREMENTS = ("us", "rule_us", "triton")  # keys of an entry beside its shape and its launch


class launching:
    """Inside, the device of ``x`` is the current one; on other devices than CUDA nothing changes.

    Args:
        x: An argument of the kernel.

    Raises:
        RuntimeError: The launch failed while a CUDA graph is captured, as the first launch of a kernel does.
    """

    __slots__ = ("guard", "x")

    def __init__(self, x: Tensor):
        self.x = x
        self.guard: torch.cuda.device | None = None

    def __enter__(self) -> None:
        device = self.x.device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            self.guard = torch.cuda.device(device)
            self.guard.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        captured = isinstance(error, Exception) and self.x.is_cuda and torch.cuda.is_current_stream_capturing()
        if self.guard is not None:
            self.guard.__exit__(kind, error, trace)
        if captured:
            raise RuntimeError(
                f"a kernel cannot be launched while a CUDA graph is captured ({error}); a kernel is compiled and "
                f"loaded by its first launch: run the model once on inputs of the same shapes before the capture"
            ) from error


class LaunchTable(Generic[L]):
    """The measured launches of one op.

    Args:
        path: Path of the JSON file.
        launch: Class of the launches, a frozen dataclass of ints and bools.
        exact: Names of the sizes that must be equal.
        at_most: Name of the size of which an entry holds the upper bound.
    """

    def __init__(self, path: Path, launch: type[L], exact: Sequence[str], at_most: str):
        self.path, self.launch, self.exact, self.at_most = path, launch, tuple(exact), at_most

    def find(self, gpu: str, shape: Shape) -> L | None:
        """The launch for a shape on the GPU of this name; None if none was measured."""
        for bound, launch in self._sorted.get((gpu, *(shape[name] for name in self.exact)), ()):
            if shape[self.at_most] <= bound:
                return launch
        return None

    def read(self) -> dict[str, list[dict[str, Any]]]:
        """The entries of each GPU.

        Raises:
            ValueError: An entry does not have the form above; the message names the file, the GPU and the entry.
        """
        entries: dict[str, list[dict[str, Any]]] = json.loads(self.path.read_text("utf-8"))
        if not isinstance(entries, dict) or not all(isinstance(rows, list) for rows in entries.values()):
            raise ValueError(
                f"{self.path.name} of {self.path.parent.name}: expected {{GPU: [entries]}}; tune the op again"
            )
        for gpu, rows in entries.items():
            seen = set()
            for row in rows:
                fault = self._fault(row)
                if fault is None and (key := tuple(sorted(row["at"].items()))) in seen:
                    fault = "this shape is listed twice"
                if fault is not None:
                    raise ValueError(
                        f"{self.path.name} of {self.path.parent.name}, {gpu}, entry {row}: {fault}; remove it and "
                        f"tune the shape again"
                    )
                seen.add(key)
        return entries

    def write(self, gpu: str, entries: Sequence[Mapping[str, Any]]) -> None:
        """Write entries into the file; they replace entries of the same shapes.

        Raises:
            ValueError: As for :meth:`read`; the file is not changed.
        """
        table = self.read()
        new = [dict(row) for row in entries]
        shapes = [row.get("at") for row in new]
        others = [row for row in table.get(gpu, []) if row["at"] not in shapes]
        for row in new:
            if (fault := self._fault(row)) is not None:
                raise ValueError(f"cannot write entry {row}: {fault}")
        names = (*self.exact, self.at_most)
        table[gpu] = sorted(others + new, key=lambda row: [row["at"][name] for name in names])
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
        launches: dict[tuple[Any, ...], list[tuple[int, L]]] = {}
        for gpu, rows in self.read().items():
            for row in rows:
                key = (gpu, *(row["at"][name] for name in self.exact))
                launches.setdefault(key, []).append((row["at"][self.at_most], self.launch_of(row)))
        return {key: sorted(rows, key=lambda row: row[0]) for key, rows in launches.items()}

    def _fault(self, row: Any) -> str | None:
        """What is wrong with an entry; None if it is valid."""
        if not isinstance(row, dict) or not isinstance(row.get("at"), dict) or not isinstance(row.get("launch"), dict):
            return 'expected "at" and "launch"'
        if unknown := row.keys() - {"at", "launch", *MEASUREMENTS}:
            return f"unknown keys: {', '.join(sorted(unknown))}"
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
                return f"{name} must be at least 1, got {value}"
        if type(row["at"][self.at_most]) is not int or row["at"][self.at_most] < 1:
            return f"{self.at_most} must be an integer of at least 1"
        return None
