"""A smoothing pair: a source and its consumers, channel by channel; pairs given by hand, by name or pattern."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, Literal

from torch import Tensor, nn

from lightning_compress.layers.matching import check_patterns, match_rank

__all__ = ["Consumer", "Mapped", "Pair", "SourceForm", "parse", "resolve", "shared_prefix", "unmatched"]

SourceForm = Literal["rows", "weight", "one_plus_weight"]


@dataclass(frozen=True)
class Consumer:
    """Where a scale goes in a module that a source feeds.

    Args:
        axes: The axis that runs over input channels, by name of the parameter.
        index_C: Index of each input channel into the scaled channels of the source, int64; -1 where it is not scaled.
    """

    axes: Mapping[str, int]
    index_C: Tensor


@dataclass(frozen=True)
class Pair:
    """A source and all that it feeds: ``source / s`` and ``consumers * s`` compute the same block.

    Args:
        source: Dotted name of the source.
        form: How the source holds its scale: in ``rows`` of its matrix, in a ``weight`` per channel, or in 1 + weight.
        channels_J: Output channels of the source that are scaled, int64.
        consumers: Modules that the source feeds, by dotted name.
    """

    source: str
    form: SourceForm
    channels_J: Tensor
    consumers: Mapping[str, Consumer] = field(default_factory=dict)

    def cpu(self) -> "Pair":
        """The same pair with its indices on the CPU, where every rank can read them."""
        consumers = {name: replace(one, index_C=one.index_C.cpu()) for name, one in self.consumers.items()}
        return replace(self, channels_J=self.channels_J.cpu(), consumers=consumers)

    def renamed(self, change: Callable[[str], str]) -> "Pair":
        """The same pair with other names."""
        consumers = {change(name): consumer for name, consumer in self.consumers.items()}
        return replace(self, source=change(self.source), consumers=consumers)


@dataclass(frozen=True)
class Mapped:
    """A mapping: a pair given by hand, for all blocks at once.

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
