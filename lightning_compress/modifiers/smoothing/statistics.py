"""What smoothing asks of a layer's inputs and weights, channel by channel.

Shapes: N tokens, R rows, C input channels, J scaled channels of a source.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

__all__ = ["ChannelMax", "ChannelMean", "ChannelStatistic", "to_source"]


class ChannelStatistic(ABC):
    """A number for each channel.

    Args:
        columns: C.
        device: Where the inputs are.
    """

    reduce: dict[str, str] = {}

    def __init__(self, columns: int, device: torch.device | None = None):
        self.held_C = torch.zeros(columns, device=device, dtype=torch.float32)
        self.tokens = 0

    def update(self, x_NC: Tensor) -> None:
        """Take N more tokens, any floating dtype."""
        if len(x_NC):
            self._take(x_NC)
            self.tokens += len(x_NC)

    @abstractmethod
    def _take(self, x_NC: Tensor) -> None:
        """Take at least one token."""

    def value(self) -> Tensor:
        """[C], float32."""
        return self.held_C


class ChannelMax(ChannelStatistic):
    """max |x_c| over tokens; the order and size of batches change nothing."""

    reduce = {"held_C": "max", "tokens": "sum"}

    def _take(self, x_NC: Tensor) -> None:
        torch.maximum(self.held_C, x_NC.abs().amax(0).float(), out=self.held_C)


class ChannelMean(ChannelStatistic):
    """mean |x_c| over tokens, added up in float32."""

    reduce = {"held_C": "sum", "tokens": "sum"}

    def _take(self, x_NC: Tensor) -> None:
        self.held_C += x_NC.abs().sum(0, dtype=torch.float32)

    def value(self) -> Tensor:
        return self.held_C / max(1, self.tokens)


def to_source(parts: Iterable[tuple[Tensor, Tensor]], J: int, how: Literal["amax", "mean"]) -> Tensor:
    """Values of input channels gathered on the channels of the source that feeds them, [J]; 0 where there are none.

    Args:
        parts: Of each consumer its ``index_C`` (modifiers/smoothing/pair.py) and its values [C].
        J: Scaled channels of the source.
        how: What to make of several values for one channel.
    """
    indices, values = zip(*[(i[i >= 0].to(v.device), v[i.to(v.device) >= 0]) for i, v in parts], strict=True)
    value_J = torch.zeros(J, device=values[0].device, dtype=torch.float32)
    return value_J.scatter_reduce_(0, torch.cat(indices), torch.cat(values).float(), how, include_self=False)
