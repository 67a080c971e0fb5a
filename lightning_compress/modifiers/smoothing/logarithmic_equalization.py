"""Logarithmic activation equalization (Li et al., 2023, FPTQ, arXiv:2308.15987).

    s_j = max|X_j| / log2(2 + max|X_j|)            eq. (6), per input channel j of all layers that one source feeds
    X' = X / s,  W' = W * s

Afterwards channel j reaches log2(2 + max|X_j|): outliers shrink, small channels stay as they are, whatever the weights
are. 1 / s goes into the source, the norm or the linear layer that makes X; sources are found and checked
(pair_finder.py).
"""

from typing import ClassVar

import torch
from torch import Tensor

from lightning_compress.modifiers.smoothing.modifier import SmoothingModifier

__all__ = ["LogarithmicEqualizationModifier", "equalizing_scale"]


def equalizing_scale(x_J: Tensor) -> Tensor:
    """s per channel from max |x|; 1 where the channel is always zero."""
    x = x_J.double()
    return torch.where(x > 0, (x / torch.log2(2 + x)).clamp(1e-5, 1e5), 1.0).float()


class LogarithmicEqualizationModifier(SmoothingModifier):
    """Shrink the outliers of activations; the model computes the same. Put it before modifiers that quantize.

    ``targets`` and ``ignore``: :class:`~lightning_compress.modifiers.smoothing.modifier.SmoothingModifier`;
    ``mappings``: :class:`~lightning_compress.modifiers.smoothing.modifier.PairModifier`.
    """

    technique: ClassVar[str] = "logarithmic_equalization"

    def scale(self, x_J: Tensor, w_J: Tensor) -> Tensor:
        return equalizing_scale(x_J)
