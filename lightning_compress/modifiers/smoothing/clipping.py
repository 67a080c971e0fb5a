"""Cut the range of each group of weights to where rounding loses least of the layer's output, as AWQ does.

    max|w| * c with the least d H_gg d^T,  d = Q(clamp(w)) - w,  c = 1, 0.95 ... 0.5

Shapes: R rows, C input channels, G groups of g columns.
"""

import math

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from lightning_compress.quant.fake_quant import round_weight
from lightning_compress.quant.scales import group_columns, minmax

__all__ = ["CLIPS", "clipped"]

CLIPS = tuple(1 - 0.05 * i for i in range(11))


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
        cut_RC = W_RC if clip == 1 else _cut(W_RC, limit_RG1 * clip, g)
        D_GRg = (round_weight(cut_RC, *minmax(cut_RC, args), args) - W_RC).float().unflatten(1, (-1, g)).transpose(0, 1)
        loss_RG = ((D_GRg @ H_Ggg) * D_GRg).sum(-1).t()
        better_RC = (loss_RG < best_RG).repeat_interleave(g, 1)
        result = torch.where(better_RC, cut_RC, result)
        best_RG = torch.minimum(best_RG, loss_RG)
    return result


def _cut(W_RC: Tensor, limit_RG1: Tensor, g: int) -> Tensor:
    return W_RC.float().unflatten(1, (-1, g)).clamp(-limit_RG1, limit_RG1).flatten(1).to(W_RC.dtype)
