"""summary.json (the run in figures) and modules.csv (one line for each row of the ledger).

``facts`` are primitives about the run. The keys that the report knows::

    model               name of the model
    recipe              name of the recipe, or the recipe itself
    metric              {name: {"before", "after", "difference", "standard_error"}}, the difference paired over tokens
    metric_dense        {"step", "values"}: the same metric before training began to compress, where it did
    gate                [{"metric", "limit", "before", "after", "change", "standard_error", "held", "text", ...}]
    promotion           [{"round", "promoted": {module: "W3A16 g128 sym -> W4A16 g128 sym"}, "gates": [texts]}]
    model_bytes_before  of the model with all its weights, before anything was cut
    model_bytes_after   of the weight files as written; without an export, of the weights at their bits
    seconds             {phase: seconds}
    peak_memory_bytes   highest memory use of the process, in bytes
    plan                what was planned before the run, in the form of planning/plan.py
    leave_dense         {technique: how to add MODULE to what its modifier ignores}
    more_bits           {technique: {bits of inputs: how to give MODULE weights of 8 bits}}
    seed, versions      versions is {package: version}; left out, it is looked up
    export_dir          where the compressed model lies

Each may be missing; any other key goes into summary.json as it is.
"""

import csv
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning_compress.core.ledger import Ledger, Row
from lightning_compress.files.atomic_file import whole_file

__all__ = ["headline", "installed_versions", "metric_change", "totals", "write"]

PACKAGES = ("lightning-compress", "lightning", "torch", "compressed-tensors", "transformers", "safetensors")


def write(folder: str | Path, ledger: Ledger, facts: Mapping[str, Any]) -> None:
    """Write ``summary.json``, ``modules.csv`` and the ledger's files; each is there whole or not at all.

    Args:
        folder: Made if it is missing.
        ledger: What was done to each module.
        facts: See the module's docstring. They win over what the ledger adds up to.
    """
    summary = {**totals(ledger), "divergence": ledger.blocks, "versions": installed_versions(), **facts}
    with whole_file(Path(folder) / "summary.json") as path:
        path.write_text(json.dumps(_plain(summary), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with whole_file(Path(folder) / "modules.csv") as path, path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        table.writeheader()
        table.writerows({**asdict(row), "flags": "; ".join(row.flags)} for row in ledger)
    for name, text in ledger.files.items():
        with whole_file(Path(folder) / name) as path:
            path.write_text(text, encoding="utf-8")


def metric_change(entry: Mapping[str, Any]) -> float | None:
    """The difference of a metric after and before; None where one of them is not known."""
    before, after = entry.get("before"), entry.get("after")
    change: float | None = entry.get("difference")
    return after - before if change is None and before is not None and after is not None else change


def headline(facts: Mapping[str, Any]) -> str:
    """``gptq_w4 of LlamaForCausalLM``, as far as it is known."""
    return " of ".join(str(facts[key]) for key in ("recipe", "model") if isinstance(facts.get(key), str))


def totals(ledger: Ledger) -> dict[str, Any]:
    """What the ledger adds up to.

    Returns:
        ``modules`` (how many), ``params``, ``bytes_before``, ``bytes_after`` (of the modules that have them; of two
        techniques on one module the later one counts), ``bits_per_weight`` and ``sparsity`` (weighted by params; the
        latter of the modules that report one) and ``flags`` ({flag: modules}). What no row knows is None.
    """
    last: dict[str, Row] = {}
    for row in ledger:
        if row.bits is not None or row.bytes_after is not None or row.module not in last:
            last[row.module] = row
    flags: dict[str, list[str]] = {}
    for row in ledger:
        for flag in row.flags:
            flags.setdefault(flag, []).append(row.module)
    sized = [row for row in last.values() if row.bytes_before is not None and row.bytes_after is not None]
    pruned = {r.module: (r.sparsity * r.params, r.params) for r in ledger if r.sparsity is not None and r.params}
    weighed = [(row.bits * row.params, row.params) for row in last.values() if row.bits is not None and row.params]
    return {
        "modules": len(last),
        "params": sum(row.params or 0 for row in last.values()) or None,
        "bytes_before": sum(row.bytes_before or 0 for row in sized) or None,
        "bytes_after": sum(row.bytes_after or 0 for row in sized) if sized else None,
        "bits_per_weight": sum(b for b, _ in weighed) / sum(p for _, p in weighed) if weighed else None,
        "sparsity": sum(z for z, _ in pruned.values()) / sum(p for _, p in pruned.values()) if pruned else None,
        "flags": flags,
    }


def installed_versions() -> dict[str, str]:
    """Versions of Python and of what decides the numbers; a package that is not installed is left out."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _plain(value: Any) -> Any:
    """What JSON can hold; it knows no NaN and no infinity, so these become words."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, bool | int | str) else str(value)
