"""Statistics that watch an activation and say which range its static grid shall cover, for the whole tensor.

    minmax           the extremes ever seen
    moving_average   low <- low + c (low_batch - low), and so for high
    mse              of each batch the shrunken extremes with the least sum |error|^2.4; their mean over batches

Each has ``update``, ``reduce`` (how ranks combine) and ``value``: the scale [1] and the zero point [1] or None.
"""

import math
from typing import Literal, TypeGuard

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from lightning_compress.quant.formats import global_scale_of

__all__ = ["MinMax", "MovingAverage", "MSE", "Observer", "ObserverName", "is_observed", "make_observer"]

ObserverName = Literal["minmax", "moving_average", "mse"]


class Observer:
    """What the three share: numbers ``low``, ``high`` and the scale that follows from them.

    Args:
        args: The grid.
    """

    reduce: dict[str, str] = {}

    def __init__(self, args: QuantizationArgs):
        self.args = args
        self.low, self.high = math.inf, -math.inf
        self.batches = 0

    def update(self, x: Tensor) -> None:
        """Take one activation, of any shape, any floating dtype.

        Raises:
            ValueError: It holds NaN or Inf.
        """
        low, high = (float(v) for v in x.detach().aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"its input holds NaN or Inf in calibration batch {self.batches + 1}")
        self._take(x.detach(), low, high)
        self.batches += 1

    def _take(self, x: Tensor, low: float, high: float) -> None:
        raise NotImplementedError

    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest value that the grid covers."""
        return self.low, self.high

    def value(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
        """Scale [1] in ``dtype`` and zero point [1], None on a symmetric grid.

        Raises:
            ValueError: It never saw data.
        """
        if not self.batches:
            raise ValueError("an observer that never saw data has no scale; calibrate first")
        low, high = (torch.tensor([v], dtype=dtype) for v in self.bounds())
        scale, zero = calculate_qparams(low, high, self.args)
        return scale, None if self.args.symmetric else zero

    def global_scale(self) -> Tensor:
        """g of NVFP4, float32 [1]."""
        low, high = (torch.tensor(v) for v in self.bounds())
        return global_scale_of(low, high)


class MinMax(Observer):
    """The extremes ever seen. Order and size of batches change nothing."""

    reduce = {"low": "min", "high": "max", "batches": "sum"}

    def _take(self, x: Tensor, low: float, high: float) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)


class MovingAverage(Observer):
    """Exponential mean of each batch's extremes; the last batches count most. Ranks are averaged.

    Args:
        args: The grid.
        averaging_constant: c in (0, 1]; 1 keeps the last batch only.
    """

    reduce = {"low": "sum", "high": "sum", "ranks": "sum", "batches": "sum"}

    def __init__(self, args: QuantizationArgs, averaging_constant: float = 0.01):
        super().__init__(args)
        self.constant, self.ranks = averaging_constant, 0          # ranks that saw data
        self.low = self.high = 0.0

    def _take(self, x: Tensor, low: float, high: float) -> None:
        c = self.constant if self.batches else 1.0
        self.ranks = 1
        self.low, self.high = self.low + c * (low - self.low), self.high + c * (high - self.high)

    def bounds(self) -> tuple[float, float]:
        return self.low / self.ranks, self.high / self.ranks


class MSE(Observer):
    """Clips outliers where that makes the error of the rest smaller (p = 2.4, factors 1.0, 0.95, ... 0.2)."""

    reduce = {"low": "sum", "high": "sum", "batches": "sum"}

    POWER = 2.4
    FACTORS = tuple(round(1 - 0.05 * i, 2) for i in range(17))
    SAMPLES = 1 << 16

    def __init__(self, args: QuantizationArgs):
        super().__init__(args)
        self.low = self.high = 0.0

    def _take(self, x: Tensor, low: float, high: float) -> None:
        sample = x.flatten()[:: max(1, x.numel() // self.SAMPLES)].float()
        best = min(self.FACTORS, key=lambda f: self._error(sample, f * low, f * high))
        self.low, self.high = self.low + best * low, self.high + best * high

    def _error(self, x: Tensor, low: float, high: float) -> float:
        bounds = (torch.tensor([v], device=x.device) for v in (low, high))
        scale, zero = calculate_qparams(*bounds, self.args)
        return float((fake_quantize(x, scale, zero, self.args) - x).abs_().pow_(self.POWER).sum())

    def bounds(self) -> tuple[float, float]:
        return self.low / self.batches, self.high / self.batches


def is_observed(args: QuantizationArgs | None) -> TypeGuard[QuantizationArgs]:
    """True when calibration must find a scale: static activations, and NVFP4, whose global scale is static."""
    return args is not None and args.dynamic is not True


def make_observer(name: ObserverName, args: QuantizationArgs, averaging_constant: float) -> Observer:
    """The observer called ``name``."""
    if name == "moving_average":
        return MovingAverage(args, averaging_constant)
    return MinMax(args) if name == "minmax" else MSE(args)
