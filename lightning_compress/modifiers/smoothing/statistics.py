"""Statistics of the input channels of a layer, and their values on the channels of the source that feeds them.

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
        columns: Number of input channels, C.
        device: Device of the inputs.
    """

    reduce: dict[str, str] = {}

    def __init__(self, columns: int, device: torch.device | None = None):
        self.columns, self.device = columns, device
        self.tokens = 0

    def update(self, x_NC: Tensor) -> None:
        """Add N tokens of any floating dtype."""
        if len(x_NC):
            self._add(x_NC)
            self.tokens += len(x_NC)

    @abstractmethod
    def _add(self, x_NC: Tensor) -> None:
        """Add at least one token."""

    @abstractmethod
    def value(self) -> Tensor:
        """[C], float32."""


class ChannelMax(ChannelStatistic):
    """max |x_c| over tokens; the order and size of batches change nothing."""

    reduce = {"max_C": "max", "tokens": "sum"}

    def __init__(self, columns: int, device: torch.device | None = None):
        super().__init__(columns, device)
        self.max_C = torch.zeros(columns, device=device, dtype=torch.float32)

    def _add(self, x_NC: Tensor) -> None:
        torch.maximum(self.max_C, x_NC.abs().amax(0).float(), out=self.max_C)

    def value(self) -> Tensor:
        return self.max_C


class ChannelMean(ChannelStatistic):
    """mean |x_c| over tokens; the float32 sums of inputs are added in float64, so that ranks change no bit."""

    reduce = {"sum_C": "sum", "tokens": "sum"}

    def __init__(self, columns: int, device: torch.device | None = None):
        super().__init__(columns, device)
        self.sum_C = torch.zeros(columns, dtype=torch.float64, device="cpu")

    def _add(self, x_NC: Tensor) -> None:
        self.sum_C += x_NC.abs().sum(0, dtype=torch.float32).cpu()

    def value(self) -> Tensor:
        return (self.sum_C / max(1, self.tokens)).float().to(self.device)


def to_source(consumers: Iterable[tuple[Tensor, Tensor]], J: int, how: Literal["amax", "mean"]) -> Tensor:
    """Values of input channels gathered on the channels of the source that feeds them, [J]; 0 where there are none.

    Args:
        consumers: ``index_C`` (modifiers/smoothing/pair.py) and values [C] of each consumer.
        J: Number of scaled channels of the source.
        how: Reduction of several values for one channel.
    """
    indices, values = zip(*[(i[i >= 0].to(v.device), v[i.to(v.device) >= 0]) for i, v in consumers], strict=True)
    value_J = torch.zeros(J, device=values[0].device, dtype=torch.float32)
    return value_J.scatter_reduce_(0, torch.cat(indices), torch.cat(values).float(), how, include_self=False)
