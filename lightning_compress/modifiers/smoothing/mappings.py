"""Smoothing pairs given by hand: a source and the layers that it feeds, by name or pattern, for all blocks at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from torch import nn

from lightning_compress.layers.matching import check_patterns, match_rank

__all__ = ["Mapped", "parse", "resolve", "shared_prefix", "unmatched"]


@dataclass(frozen=True)
class Mapped:
    """One mapping.

    Args:
        source: Dotted name, ``re:`` pattern or class of the source.
        consumers: Dotted names, ``re:`` patterns or classes of the modules that the source feeds.
    """

    source: str
    consumers: tuple[str, ...]


def parse(entries: Sequence[Any]) -> list[Mapped]:
    """Mappings from the entries of a recipe.

    Args:
        entries: ``{smooth_layer: ..., balance_layers: [...]}``, or ``[balance_layers, smooth_layer]``.

    Raises:
        ValueError: An entry is neither, or a pattern is not a valid regular expression.
    """
    parsed = []
    for number, entry in enumerate(entries):
        if isinstance(entry, Mapping):
            source, consumers = entry.get("smooth_layer"), entry.get("balance_layers")
            well_formed = set(entry) == {"smooth_layer", "balance_layers"}
        else:
            well_formed = isinstance(entry, Sequence) and not isinstance(entry, str) and len(entry) == 2
            consumers, source = entry if well_formed else (None, None)
        consumers = [consumers] if isinstance(consumers, str) else consumers
        if not well_formed or not isinstance(source, str) or not isinstance(consumers, Sequence) or not consumers:
            raise ValueError(
                f"mappings[{number}]={entry!r}: expected {{'smooth_layer': 're:.*input_layernorm', 'balance_layers': "
                f"['re:.*q_proj', 're:.*k_proj', 're:.*v_proj']}}, or [balance_layers, smooth_layer]"
            )
        check_patterns([source, *consumers], f"mappings[{number}]")
        parsed.append(Mapped(source, tuple(consumers)))
    return parsed


def resolve(mappings: Sequence[Mapped], modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """For each source among ``modules`` the names of the modules that it feeds.

    Where an entry names several sources (experts), each gets the consumers that share most of its name.
    """
    resolved: dict[str, list[str]] = {}
    for mapped in mappings:
        sources = [n for n, m in modules.items() if match_rank(n, m, mapped.source)]
        for name, module in modules.items():
            if sources and any(match_rank(name, module, c) for c in mapped.consumers):
                nearest = max(sources, key=lambda source: shared_prefix(source, name))
                resolved.setdefault(nearest, []).append(name)
    return resolved


def unmatched(mappings: Sequence[Mapped], modules: Mapping[str, nn.Module]) -> list[tuple[int, str]]:
    """(number of the mapping, pattern) for patterns that match nothing in a model."""
    patterns = [(i, pattern) for i, mapped in enumerate(mappings) for pattern in (mapped.source, *mapped.consumers)]
    return [(i, pattern) for i, pattern in patterns if not any(match_rank(n, m, pattern) for n, m in modules.items())]


def shared_prefix(one: str, other: str) -> int:
    """How many leading parts two dotted names share."""
    equal = (a == b for a, b in zip(one.split("."), other.split("."), strict=False))
    return sum(takewhile(bool, equal))
