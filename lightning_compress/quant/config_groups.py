"""A choice of schemes as ``config_groups``: a group for each scheme, its targets the names of modules.

Modules that servers fuse get one scheme: query, key and value; gate and up; all experts of a mixture.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from compressed_tensors.quantization import QuantizationScheme

from lightning_compress.quant.schemes import describe
from lightning_compress.quant.shared_scales import fused_with

__all__ = ["Schemes", "config_groups", "fused_groups", "raised"]

Schemes = dict[str, QuantizationScheme | None]
"""By dotted name; None: dense."""

STEPS = (3, 4, 8)  # bits of integers that servers unpack, from 2 up
EXPERT = re.compile(r"(.*\.experts)\.\d+\.(.*)")

SPELLED_OUT = ("num_bits", "type", "symmetric", "strategy")  # also where they are defaults


def config_groups(schemes: Mapping[str, QuantizationScheme | None]) -> dict[str, Any]:
    """Primitives that a quantizer takes.

    Args:
        schemes: By dotted name; modules that stay dense (None) are in no group.
    """
    result: dict[str, dict[str, Any]] = {}
    for name, scheme in schemes.items():
        if scheme is None:
            continue
        entry = result.setdefault(_key(scheme), {"targets": [], **_parts(scheme)})
        target = _target(name)
        if target not in entry["targets"]:
            entry["targets"].append(target)
    return dict(sorted(result.items()))


def raised(scheme: QuantizationScheme, bits: int | None = None) -> QuantizationScheme | None:
    """The scheme with the next larger number of bits, or with ``bits``; None, dense, above 8."""
    bits = next((step for step in STEPS if step > scheme.weights.num_bits), None) if bits is None else bits
    if bits is None:
        return None
    return scheme.model_copy(update={"weights": scheme.weights.model_copy(update={"num_bits": bits})})


def fused_groups(names: Iterable[str]) -> list[list[str]]:
    """The names in groups of those that servers fuse, each group where its first name stands."""
    names = dict.fromkeys(names)
    groups: dict[str, list[str]] = {}
    for name in names:
        expert = EXPERT.fullmatch(name)
        groups.setdefault(expert[1] if expert is not None else fused_with(name, names)[0], []).append(name)
    return list(groups.values())


def _target(name: str) -> str:
    """The name; for an expert a pattern of all experts of its mixture, which have one scheme, for this projection."""
    expert = EXPERT.fullmatch(name)
    return name if expert is None else f"re:{re.escape(expert[1])}\\.\\d+\\.{re.escape(expert[2])}$"


def _key(scheme: QuantizationScheme) -> str:
    return re.sub(r"\W+", "_", describe(scheme).lower())


def _parts(scheme: QuantizationScheme) -> dict[str, Any]:
    parts = {"weights": scheme.weights, "input_activations": scheme.input_activations}
    entries = {}
    for name, args in parts.items():
        if args is not None:
            fields = args.model_dump(mode="json")
            changed = args.model_dump(mode="json", exclude_defaults=True)
            entries[name] = {key: fields[key] for key in dict.fromkeys([*SPELLED_OUT, *changed])}
    return entries
