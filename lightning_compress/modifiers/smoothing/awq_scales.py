"""The arithmetic of AWQ's search: the grid of scales, and the error that rounding leaves with each of them.

    s_j = x_j^r / w_j^(1 - r)          x_j = mean |X_j|, w_j = mean over rows of |W_j| / (largest of its group)
    s   = s / sqrt(max(s) min(s))
    tr(D H D^T), D = Q(W s) / s - W    the squared error of a layer's output, H = E[x x^T]

The first point of the grid is s = 1, rounding to nearest as it is.

Shapes: R rows, C input channels, J channels of the source, K points of the grid.
"""

from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from lightning_compress.quant.fake_quant import round_weight
from lightning_compress.quant.scales import group_columns, minmax

__all__ = ["GridPoint", "awq_scale", "grid", "group_sizes", "layer_errors", "rounded_with"]

AT_ONCE = 1 << 24  # weights of candidates that are rounded together: 64 MB


@dataclass(frozen=True)
class GridPoint:
    """A point of the grid: r, and whether the weights count (duo scaling)."""

    ratio: float
    duo: bool

    @property
    def is_identity(self) -> bool:
        return self.ratio == 0 and not self.duo


def grid(points: int, duo: bool) -> list[GridPoint]:
    """s = 1 first, then ratios that are spread evenly: over [0, 1] with duo scaling, over (0, 1] without."""
    if points == 1:
        return [GridPoint(0.0, False)]
    if duo:
        return [GridPoint(0.0, False), *(GridPoint(i / max(1, points - 2), True) for i in range(points - 1))]
    return [GridPoint(i / (points - 1), False) for i in range(points)]


def awq_scale(x_J: Tensor, w_J: Tensor, point: GridPoint) -> Tensor:
    """s per channel, float32; 1 where the channel is always zero.

    Args:
        x_J: mean |x| of each channel.
        w_J: :func:`group_sizes` of the weights that the channel feeds.
        point: Exponent r, and whether w counts.
    """
    if point.is_identity:
        return torch.ones_like(x_J)
    s_J = x_J.double().pow(point.ratio)
    if point.duo:
        s_J = s_J / (w_J.double().pow(1 - point.ratio) + 1e-4)
    alive_J = (x_J > 0) & s_J.isfinite() & (s_J > 0)
    if not alive_J.any():
        return torch.ones_like(x_J)
    s_J = s_J.clamp(min=1e-4)
    s_J = s_J / (s_J[alive_J].max() * s_J[alive_J].min()).sqrt()
    return torch.where(alive_J, s_J, 1.0).float()


def group_sizes(W_RC: Tensor, args: QuantizationArgs) -> Tensor:
    """mean over rows of |w| / (largest |w| of its group), [C]: how columns lie in the grids of their groups."""
    size_RC = W_RC.float().abs()
    if args.strategy == "tensor":
        return (size_RC / (size_RC.max() + 1e-6)).mean(0)
    blocks = size_RC.unflatten(1, (-1, group_columns(args, W_RC.shape[1])))
    return (blocks / (blocks.amax(-1, keepdim=True) + 1e-6)).flatten(1).mean(0)


def rounded_with(W_RC: Tensor, s_C: Tensor, args: QuantizationArgs) -> Tensor:
    """Q(W s) / s: what the layer computes with once s is folded, in the dtype of W."""
    scaled_RC = (W_RC.float() * s_C).to(W_RC.dtype)
    return (round_weight(scaled_RC, *minmax(scaled_RC, args), args).float() / s_C).to(W_RC.dtype)


def layer_errors(W_RC: Tensor, s_KC: Tensor, args: QuantizationArgs, H_CC: Tensor) -> Tensor:
    """tr(D H D^T) of each point, [K]: the squared error of the layer's output, summed over rows, per token."""
    R, C = W_RC.shape
    points = 1 if args.strategy == "tensor" else max(1, AT_ONCE // (R * C))
    errors = []
    for s_kC in s_KC.split(points):
        D_kRC = torch.cat([W_RC.float()] * len(s_kC))
        s_rows = s_kC.repeat_interleave(R, 0)
        scaled = (D_kRC * s_rows).to(W_RC.dtype)
        D_kRC = round_weight(scaled, *minmax(scaled, args), args).float() / s_rows - D_kRC
        errors.append(((D_kRC @ H_CC) * D_kRC).sum(1).view(len(s_kC), R).sum(1, dtype=torch.float64))
    return torch.cat(errors)
