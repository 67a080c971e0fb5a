r"""Importance of the units of a group: by their weights, by the change of the loss, by their activations.

    magnitude    sqrt(sum_w w^2)                                    over every matrix with weights of the unit
    taylor       sum_t sum_matrices (sum_w w g_t)^2                 Molchanov et al. 2019, arXiv:1906.10771
    activation   sqrt(mean_n sum_k x_nk^2)                          of the inputs of the layers that read the unit;
                                                                    Muralidharan et al. 2024, arXiv:2407.14679

Shapes: U units, K indices of one unit along a dimension of size C, N tokens or pixels.
"""

import torch
from torch import Tensor

__all__ = ["block_influence", "input_energy", "strongest", "unit_gate_gradient", "unit_square_sum"]


def unit_square_sum(W: Tensor, dim: int, index_UK: Tensor) -> Tensor:
    """sum w^2 of each unit, float32 [U]."""
    return _by_unit(_along(W.detach().float().square(), dim), index_UK)


def unit_gate_gradient(W: Tensor, gradient: Tensor, dim: int, index_UK: Tensor) -> Tensor:
    """sum w g of each unit, float32 [U]: the derivative of the loss for a gate on the unit."""
    return _by_unit(_along(W.detach().float() * gradient.detach().float(), dim), index_UK)


def input_energy(x: Tensor, channel_dim: int, index_UK: Tensor, mask: Tensor | None = None) -> tuple[Tensor, int]:
    """sum x^2 of each unit over all tokens that count, float32 [U], and their number.

    Args:
        x: Input of a layer.
        channel_dim: Dimension of the channels: -1 for Linears, 1 for convolutions.
        index_UK: Indices of the units among the channels.
        mask: True for tokens that count, bool, in the leading shape of ``x``; ignored where it does not fit.
    """
    x_NC = x.detach().float().movedim(channel_dim, -1)
    if mask is not None and mask.shape == x_NC.shape[:-1]:
        x_NC = x_NC[mask]
    x_NC = x_NC.flatten(0, -2)
    return _by_unit(x_NC.square().sum(0), index_UK), len(x_NC)


def block_influence(x: Tensor, y: Tensor, mask: Tensor | None = None) -> tuple[float, int]:
    """sum (1 - cos) between input and output of a block, over tokens that count, and their number.

    Args:
        x: Input, [..., C].
        y: Output, of the same shape.
        mask: True for tokens that count, bool [...]; ignored where it does not fit.
    """
    if x.shape != y.shape:
        raise ValueError(
            f"a block takes {tuple(x.shape)} and gives {tuple(y.shape)}: without it shapes would not fit, so that it "
            f"cannot be left out"
        )
    change = 1 - torch.cosine_similarity(x.detach().float(), y.detach().float(), dim=-1)
    if mask is not None and mask.shape == change.shape:
        change = change[mask]
    return float(change.double().sum().float()), change.numel()  # float32: added up in float64, in any order


def strongest(score_U: Tensor, count: int) -> Tensor:
    """The ``count`` units with the highest scores, ascending; the first of equal ones stay."""
    return torch.argsort(score_U, descending=True, stable=True)[:count].sort().values


def _along(W: Tensor, dim: int) -> Tensor:
    """Summed over every other dimension, [C]."""
    return W.sum([d for d in range(W.dim()) if d != dim]) if W.dim() > 1 else W


def _by_unit(value_C: Tensor, index_UK: Tensor) -> Tensor:
    return value_C[index_UK.to(value_C.device)].sum(1)
