"""Smoothing pairs given by hand: a source and what it feeds, by name or pattern, for all blocks at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_compress.layers.matching import check_patterns, match_rank

__all__ = ["Mapped", "parse", "resolve", "unmatched"]


@dataclass(frozen=True)
class Mapped:
    """One entry.

    Args:
        source: What the source matches: a dotted name, a ``re:`` pattern, a class.
        consumers: What the modules match that it feeds.
    """

    source: str
    consumers: tuple[str, ...]


def parse(entries: Sequence[Any]) -> list[Mapped]:
    """Entries as users write them.

    Args:
        entries: ``{smooth_layer: ..., balance_layers: [...]}``, or ``[balance_layers, smooth_layer]``.

    Raises:
        ValueError: An entry is neither, or a pattern is not a valid regular expression.
    """
    parsed = []
    for number, entry in enumerate(entries):
        if isinstance(entry, Mapping):
            source, consumers = entry.get("smooth_layer"), entry.get("balance_layers")
            fine = set(entry) == {"smooth_layer", "balance_layers"}
        else:
            fine = isinstance(entry, Sequence) and not isinstance(entry, str) and len(entry) == 2
            consumers, source = entry if fine else (None, None)
        consumers = [consumers] if isinstance(consumers, str) else consumers
        if not fine or not isinstance(source, str) or not isinstance(consumers, Sequence) or not consumers:
            raise ValueError(
                f"mappings[{number}]={entry!r}: expected {{'smooth_layer': 're:.*input_layernorm', 'balance_layers': "
                f"['re:.*q_proj', 're:.*k_proj', 're:.*v_proj']}}, or [balance_layers, smooth_layer]"
            )
        check_patterns([source, *consumers], f"mappings[{number}]")
        parsed.append(Mapped(source, tuple(consumers)))
    return parsed


def resolve(mappings: Sequence[Mapped], modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Per source among ``modules`` the names of what it shall feed.

    Where an entry names several sources (experts), each gets the consumers that share most of its name.
    """
    resolved: dict[str, list[str]] = {}
    for mapped in mappings:
        sources = [n for n, m in modules.items() if match_rank(n, m, mapped.source)]
        for name, module in modules.items():
            if sources and any(match_rank(name, module, c) for c in mapped.consumers):
                nearest = max(sources, key=lambda source: _common(source, name))
                resolved.setdefault(nearest, []).append(name)
    return resolved


def unmatched(mappings: Sequence[Mapped], modules: Mapping[str, nn.Module]) -> list[tuple[int, str]]:
    """(number, part) of the entries that match nothing in a model."""
    parts = [(i, part) for i, mapped in enumerate(mappings) for part in (mapped.source, *mapped.consumers)]
    return [(i, part) for i, part in parts if not any(match_rank(n, m, part) for n, m in modules.items())]


def _common(one: str, other: str) -> int:
    """How many leading parts two names share."""
    shared = 0
    for a, b in zip(one.split("."), other.split("."), strict=False):
        if a != b:
            break
        shared += 1
    return shared
