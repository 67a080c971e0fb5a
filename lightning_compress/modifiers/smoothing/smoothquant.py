"""SmoothQuant: move the outliers of activations into the weights (Xiao et al., 2022, arXiv:2211.10438).

    s_j = max|X_j|^a / max|W_j|^(1 - a)            eq. (4), per input channel j of all layers that one source feeds
    X' = X / s,  W' = W * s                        eq. (3): X' W'^T = X W^T

1 / s goes into the source: the norm or the linear layer that makes X. Sources are found and checked (pair_finder.py).
"""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from lightning_compress.modifiers.smoothing.modifier import SmoothingModifier

__all__ = ["SmoothQuantModifier", "smoothing_scale"]


def smoothing_scale(x_J: Tensor, w_J: Tensor, strength: float) -> Tensor:
    """s per channel; 1 where the channel is always zero, or all its weights are.

    Args:
        x_J: max |x| of each channel.
        w_J: max |w| of each channel.
        strength: a in [0, 1]; 1 moves all of the difficulty to the weights, 0 none of it.
    """
    s_J = x_J.double().pow(strength) / w_J.double().pow(1 - strength)
    return torch.where((x_J > 0) & (w_J > 0), s_J.clamp(1e-5, 1e5), 1.0).float()


class SmoothQuantModifier(SmoothingModifier):
    """Make activations easy to quantize; the model computes the same. Put it before modifiers that quantize.

    ``targets`` and ``ignore``: :class:`~lightning_compress.modifiers.smoothing.modifier.SmoothingModifier`;
    ``mappings``: :class:`~lightning_compress.modifiers.smoothing.modifier.PairModifier`.

    Args:
        smoothing_strength: a; 0.5 suits most models, 0.75 to 0.85 those with strong outliers.
    """

    technique: ClassVar[str] = "smoothquant"

    smoothing_strength: float = Field(default=0.5, ge=0, le=1)

    def scale(self, x_J: Tensor, w_J: Tensor) -> Tensor:
        return smoothing_scale(x_J, w_J, self.smoothing_strength)
