"""Logarithmic activation equalization (Li et al., 2023, FPTQ, arXiv:2308.15987).

    s_j = max|X_j| / log2(2 + max|X_j|)            eq. (6), per input channel j of all layers that one source feeds
    X' = X / s,  W' = W * s

Afterwards channel j reaches log2(2 + max|X_j|): outliers are pulled in, small channels stay as they are. Weights are
not asked. 1 / s goes into the source, the norm or the linear layer that makes X; sources are found and checked
(smoothing/).
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
    """Pull in the outliers of activations; the model computes what it did. Put it before what quantizes.

    Args:
        targets: Class names, dotted names or ``re:`` patterns of the layers whose inputs shall be smooth.
        ignore: The same, for what is left out.
        mappings: Pairs by hand, in place of those that are found: ``{smooth_layer: ..., balance_layers: [...]}`` or
            ``[balance_layers, smooth_layer]``, names or patterns.

    Raises:
        ValueError: A pair given by hand is not invariant, or matches nothing.
    """

    technique: ClassVar[str] = "logarithmic_equalization"

    def scale(self, x_J: Tensor, w_J: Tensor) -> Tensor:
        return equalizing_scale(x_J)
