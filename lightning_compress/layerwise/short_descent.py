"""Adam for trainings of few steps, whose rate falls to zero.

rate of step k of K:  lr (1 + cos(pi k / K)) / 2        beta2 = 0.95: a run has few steps
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["set_rate", "short_adam"]

BETAS = 0.9, 0.95


def short_adam(tensors: Sequence[Tensor], rate: float) -> torch.optim.Adam:
    """The optimizer, at its first rate."""
    return torch.optim.Adam(tensors, lr=rate, betas=BETAS)


def set_rate(optimizer: torch.optim.Optimizer, rate: float, step: int, steps: int) -> None:
    """Set the rate of a step, counted from 0; ``rate`` is that of the first."""
    optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * (step / steps))) / 2
