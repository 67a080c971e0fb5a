"""Reference of the op, slow and obvious: of every four neighbours the two with the highest scores are kept.

Of equal scores the later one is kept; NaN counts as the highest, as in torch's sort.

Shapes: R rows, C columns.
"""

import torch
from torch import Tensor

__all__ = ["mask_2of4"]


def mask_2of4(score_RC: Tensor) -> Tensor:
    """Bool [R, C], True where the weight is kept."""
    fours = score_RC.reshape(-1, 4)
    lowest = fours.argsort(dim=1, stable=True)[:, :2]
    return torch.ones_like(fours, dtype=torch.bool).scatter_(1, lowest, False).view(score_RC.shape)
