"""The arithmetic of AWQ's searches: the grid of scales, the error that rounding leaves with each, and clipping.

    s_j = x_j^r / w_j^(1 - r)          x_j = mean |X_j|, w_j = mean over rows of |W_j| / (largest of its group)
    s   = s / sqrt(max(s) min(s))
    tr(D H D^T), D = Q(W s) / s - W    the squared error of a layer's output, H = E[x x^T]
    max|w| * c of each group with the least d H_gg d^T,  d = Q(clamp(w)) - w,  c = 1, 0.95 ... 0.5

The first point of the grid is s = 1, rounding to nearest as it is.

Shapes: R rows, C input channels, J channels of the source, K points of the grid, G groups of g columns.
"""

import math
from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from lightning_compress.quant.fake_quant import round_weight
from lightning_compress.quant.scales import group_columns, minmax

__all__ = ["CLIPS", "GridPoint", "awq_scale", "clipped", "grid", "group_sizes", "layer_errors", "rounded_with"]

CLIPS = tuple(1 - 0.05 * i for i in range(11))
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


def clipped(W_RC: Tensor, args: QuantizationArgs, H_CC: Tensor) -> Tensor:
    """The weight with each group's range cut to where rounding loses least of the output, group by group.

    Args:
        W_RC: Weight of the layer.
        args: Quantization grid of the weight, with one scale per group or per row.
        H_CC: E[x x^T] of the inputs of the layer; only the blocks on the diagonal count.
    """
    R, C = W_RC.shape
    g = group_columns(args, C)
    H_Ggg = torch.stack([H_CC[i : i + g, i : i + g] for i in range(0, C, g)])
    limit_RG1 = W_RC.float().abs().unflatten(1, (-1, g)).amax(-1, keepdim=True)
    best_RG = torch.full((R, C // g), math.inf, device=W_RC.device, dtype=torch.float32)
    result = W_RC.clone()
    for clip in CLIPS:
        limit, cut_RC = limit_RG1 * clip, W_RC
        if clip != 1:
            cut_RC = W_RC.float().unflatten(1, (-1, g)).clamp(-limit, limit).flatten(1).to(W_RC.dtype)
        D_GRg = (round_weight(cut_RC, *minmax(cut_RC, args), args) - W_RC).float().unflatten(1, (-1, g)).transpose(0, 1)
        loss_RG = ((D_GRg @ H_Ggg) * D_GRg).sum(-1).t()
        better_RC = (loss_RG < best_RG).repeat_interleave(g, 1)
        result = torch.where(better_RC, cut_RC, result)
        best_RG = torch.minimum(best_RG, loss_RG)
    return result
