"""Observers: statistics of an activation that choose the range of its static grid, one for the whole tensor.

    minmax           the extremes of all data
    moving_average   low <- low + c (low_batch - low), and so for high
    mse              the shrunken extremes with the least sum |error|^2.4 over all values, by a histogram
    percentile       all but the outermost 0.01 % at either end, by the same histogram
    histogram        the shrunken extremes with the least KL divergence (entropy calibration), by the same histogram

Each has ``update``, ``reduce`` (how ranks combine) and ``value``: the scale [1] and the zero point [1] or None. What a
GPU has computed of a batch stays there until :meth:`Observer.read`, so that no batch makes the host wait.
"""

import math
from abc import ABC, abstractmethod
from typing import Literal, TypeGuard

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from lightning_compress.quant.formats import global_scale_of
from lightning_compress.quant.histogram import BINS, bins_of, edges, points

__all__ = ["Entropy", "MeanSquare", "MinMax", "MovingAverage", "MSE", "Observer", "ObserverName", "Percentile",
           "is_observed", "make_observer"]  # fmt: skip

ObserverName = Literal["minmax", "moving_average", "mse", "percentile", "histogram"]


class Observer(ABC):
    """Base class of observers: numbers ``low`` and ``high``, and the scale that follows from them."""

    reduce: dict[str, str] = {}

    def __init__(self, args: QuantizationArgs):
        self.args = args
        self.low, self.high = math.inf, -math.inf
        self.batches = 0
        self._unread: list[tuple[int, Tensor, Tensor | None, int]] = []  # index, extremes, histogram, batch

    def update(self, x: Tensor, batch: int = 0) -> None:
        """Add one activation, of any shape and any floating dtype.

        Args:
            x: The activation.
            batch: The number of the calibration batch.

        Raises:
            ValueError: The activation holds NaN or Inf; of one on a GPU :meth:`read` says so.
        """
        x = x.detach()
        self._unread.append((self.batches, torch.stack(x.aminmax()), self._histogram(x), batch))
        self.batches += 1
        if not x.is_cuda:
            self.read()

    def read(self) -> None:
        """Add what waits on a GPU; called before ranks are combined, and by all that need a result.

        Raises:
            ValueError: An activation holds NaN or Inf.
        """
        unread, self._unread = self._unread, []
        ends = torch.stack([ends for _, ends, _, _ in unread]).tolist() if unread else []
        for (index, _, _, batch), (low, high) in zip(unread, ends, strict=True):
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError(f"its input {index} (counted from 0) holds NaN or Inf")
            self._add(low, high, batch)
        if histograms := [counts for _, _, counts, _ in unread if counts is not None]:
            self._add_histogram(torch.stack(histograms).sum(0).cpu())  # whole numbers: any order gives the same sum

    def _histogram(self, x: Tensor) -> Tensor | None:
        """The histogram of an activation, on its device; None where it is not used."""
        return None

    @abstractmethod
    def _add(self, low: float, high: float, batch: int) -> None:
        """Add the extremes of an activation, which are finite."""

    def _add_histogram(self, counts: Tensor) -> None:
        """Add the histogram of some activations, of an observer that makes one."""
        raise NotImplementedError

    @property
    def is_dead(self) -> bool:
        """True when all data was 0: the scale is then a placeholder."""
        return self.batches > 0 and self.bounds() == (0.0, 0.0)

    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest value that the grid covers."""
        self.read()
        return self._bounds()

    def _bounds(self) -> tuple[float, float]:
        return self.low, self.high

    def value(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
        """Scale [1] in ``dtype`` and zero point [1], None on a symmetric grid.

        Raises:
            ValueError: There was no data.
        """
        if not self.batches:
            raise ValueError("an observer that never saw data has no scale; calibrate first")
        low, high = (torch.tensor([v], dtype=dtype, device="cpu") for v in self.bounds())
        scale, zero = calculate_qparams(low, high, self.args)
        return scale, None if self.args.symmetric else zero

    def global_scale(self) -> Tensor:
        """g of NVFP4, float32 [1]."""
        low, high = (torch.tensor(v, dtype=torch.float32, device="cpu") for v in self.bounds())
        return global_scale_of(low, high)


class MinMax(Observer):
    """The extremes of all data. Order and size of batches change nothing."""

    reduce = {"low": "min", "high": "max", "batches": "sum"}

    def _add(self, low: float, high: float, batch: int) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)


class MovingAverage(Observer):
    """Exponential mean of each batch's extremes, in the order of the batches; the last ones count most.

    c = ``averaging_constant`` is in (0, 1]; 1 keeps the last batch only.
    """

    reduce = {"extremes": "union", "batches": "sum"}

    def __init__(self, args: QuantizationArgs, averaging_constant: float = 0.01):
        super().__init__(args)
        self.constant = averaging_constant
        self.extremes: dict[tuple[int, int], tuple[float, float]] = {}  # by batch, and by call within one

    def _add(self, low: float, high: float, batch: int) -> None:
        self.extremes[batch, len(self.extremes)] = low, high

    def _bounds(self) -> tuple[float, float]:
        inputs = sorted(self.extremes)
        mean_low, mean_high = self.extremes[inputs[0]]
        for key in inputs[1:]:
            low, high = self.extremes[key]
            mean_low, mean_high = (
                mean_low + self.constant * (low - mean_low),
                mean_high + self.constant * (high - mean_high),
            )
        return mean_low, mean_high


class HistogramObserver(Observer):
    """The extremes and a histogram. Order and size of batches change nothing, nor do ranks."""

    reduce = {"low": "min", "high": "max", "counts": "sum", "batches": "sum"}

    FACTORS = (*(round(1 - 0.05 * i, 2) for i in range(17)), 0.15, 0.1, 0.07, 0.05, 0.035, 0.025)

    def __init__(self, args: QuantizationArgs):
        super().__init__(args)
        self.counts = torch.zeros(BINS, dtype=torch.float64, device="cpu")

    def _histogram(self, x: Tensor) -> Tensor | None:
        return bins_of(x)

    def _add(self, low: float, high: float, batch: int) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)

    def _add_histogram(self, counts: Tensor) -> None:
        self.counts += counts

    def _quantized(self, x: Tensor, factor: float) -> Tensor:
        """On the grid that covers the shrunken extremes; float32."""
        ends = (torch.tensor([factor * v], dtype=torch.float32, device="cpu") for v in (self.low, self.high))
        scale, zero = calculate_qparams(*ends, self.args)
        return fake_quantize(x.float(), scale, zero, self.args)


class MSE(HistogramObserver):
    """Clips outliers where that makes the error of the rest smaller (p = 2.4, factors 1.0, 0.95, ... 0.025)."""

    POWER = 2.4

    def _bounds(self) -> tuple[float, float]:
        x, counts, _ = points(self.counts, self.low, self.high)
        best = min(self.FACTORS, key=lambda f: float(((self._quantized(x, f) - x).abs() ** self.POWER) @ counts))
        return best * self.low, best * self.high


class Percentile(HistogramObserver):
    """Leaves out the outermost 0.01 % at either end."""

    SHARE = 1e-4

    def _bounds(self) -> tuple[float, float]:
        below, above = self.counts.cumsum(0), self.counts.flip(0).cumsum(0).flip(0)
        lower, upper = edges()
        inside = (below > self.SHARE * self.counts.sum()) & (above > self.SHARE * self.counts.sum())
        return max(self.low, float(lower[inside].amin())), min(self.high, float(upper[inside].amax()))


class Entropy(HistogramObserver):
    """The range that loses least information: KL(P || Q), P the clipped data, Q its codes spread out again.

    Migacz, 2017, 8-bit inference with TensorRT: the mass outside of the range is added to P at its ends, not to Q.
    """

    def _bounds(self) -> tuple[float, float]:
        x, counts, widths = points(self.counts, self.low, self.high)
        best = min(self.FACTORS, key=lambda f: self._divergence(x, counts, widths, f))
        return best * self.low, best * self.high

    def _divergence(self, x: Tensor, counts: Tensor, widths: Tensor, factor: float) -> float:
        widest = max(-self.low, self.high)
        low, high = (factor * v for v in ((-widest, widest) if self.args.symmetric else (self.low, self.high)))
        inside = (x >= low) & (x <= high)
        if not inside.any():
            return math.inf
        clipped = counts[inside].clone()
        _, code = self._quantized(x[inside], factor).unique(return_inverse=True)
        mass, width = (torch.zeros(int(code.max()) + 1, dtype=torch.float64, device="cpu") for _ in range(2))
        mass.index_add_(0, code, clipped)
        width.index_add_(0, code, widths[inside])
        Q = (mass / width)[code] * widths[inside]
        clipped[0] += counts[x < low].sum()
        clipped[-1] += counts[x > high].sum()
        P = clipped / clipped.sum()
        return float((P * (P / (Q / Q.sum())).log()).sum())


class MeanSquare:
    """E[x^2] of each input column, by partition: how much an error in a column of the weight matters (imatrix)."""

    reduce = {"sum_PC": "sum", "tokens": "sum"}

    def __init__(self, partitions: int, columns: int):
        self.sum_PC = torch.zeros(partitions, columns, dtype=torch.float64, device="cpu")
        self.tokens = 0

    def update(self, x_PNC: Tensor) -> None:
        """Add inputs [P, N, C]."""
        sum_PC = x_PNC.float().square().sum(1).double()  # so that ranks change no bit
        self.sum_PC = sum_PC + self.sum_PC if self.tokens else sum_PC
        self.tokens += x_PNC.shape[1]

    def value(self) -> Tensor:
        """Float32 [P, C]."""
        if not self.tokens:
            raise ValueError("a statistic that never saw data has no value; calibrate first")
        return (self.sum_PC / self.tokens).float()


def is_observed(args: QuantizationArgs | None) -> TypeGuard[QuantizationArgs]:
    """True when calibration must find a scale: static activations, and NVFP4, whose global scale is static."""
    return args is not None and args.dynamic is not True


def make_observer(name: ObserverName, args: QuantizationArgs, averaging_constant: float) -> Observer:
    """The observer called ``name``."""
    if name == "moving_average":
        return MovingAverage(args, averaging_constant)
    kinds: dict[str, type[Observer]] = {"minmax": MinMax, "mse": MSE, "percentile": Percentile, "histogram": Entropy}
    return kinds[name](args)
