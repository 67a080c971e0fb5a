"""A smoothing pair: a source and its consumers, channel by channel."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

__all__ = ["Consumer", "Pair", "SourceForm"]

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

    def renamed(self, change: Callable[[str], str]) -> "Pair":
        """The same pair with other names."""
        consumers = {change(name): consumer for name, consumer in self.consumers.items()}
        return replace(self, source=change(self.source), consumers=consumers)
