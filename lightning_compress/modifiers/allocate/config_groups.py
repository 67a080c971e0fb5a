"""A choice of schemes as ``config_groups``: a group for each scheme, its targets the names of modules."""

import re
from collections.abc import Sequence
from typing import Any

from compressed_tensors.quantization import QuantizationScheme

from lightning_compress.modifiers.allocate.options import EXPERT, Group
from lightning_compress.quant.schemes import describe

__all__ = ["config_groups"]

SPELLED_OUT = ("num_bits", "type", "symmetric", "strategy")  # also where they are defaults


def config_groups(groups: Sequence[Group], choice: Sequence[int]) -> dict[str, Any]:
    """Primitives that a quantizer takes; modules that stay dense are in no group.

    Args:
        groups: Modules with their options.
        choice: The option of each group.
    """
    result: dict[str, dict[str, Any]] = {}
    for group, option in zip(groups, choice, strict=True):
        for name, scheme in group.schemes[option].items():
            if scheme is None:
                continue
            entry = result.setdefault(_key(scheme), {"targets": [], **_parts(scheme)})
            target = _target(name)
            if target not in entry["targets"]:
                entry["targets"].append(target)
    return dict(sorted(result.items()))


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
