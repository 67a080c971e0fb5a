"""The score of Wanda++ (Yang et al., 2025, arXiv:2503.04992): Wanda's, plus the gradient of the block's output.

    score_rc = (alpha G_rc + ||x_c||_2) |W_rc|
    G_rc     = sqrt( mean_n (d ||B(X_n)||_2 / d W_rc)^2 )               over N samples X_n, B the dense block

The two terms have different units, so ||x_c||_2 must be that of a sample, as in Wanda's code: the root of the mean over
samples of sum_t x_tc^2. It does not depend on batch boundaries.

Shapes: R rows (out features), C columns (in features).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_compress.modifiers.autoround.block import LearnedBlock

__all__ = ["RegionalGradient", "regional_gradients", "regional_norm"]


def regional_norm(square_C: Tensor, tokens: int, samples: int, G_RC: Tensor, alpha: float) -> Tensor:
    """The factor of |W| in the score, [R, C].

    Args:
        square_C: E[x_c^2] over tokens.
        tokens: Number of tokens.
        samples: Number of samples that hold these tokens.
        G_RC: Regional gradient.
        alpha: Weight of the regional gradient.
    """
    return (square_C * (tokens / samples)).sqrt() + alpha * G_RC


def regional_gradients(block: LearnedBlock, weights: Mapping[str, Tensor]) -> dict[str, "RegionalGradient"]:
    """G of every weight of a dense block, by name.

    Args:
        block: The block, inside of :meth:`LearnedBlock.learning`.
        weights: Weights by name, [R, C].
    """
    statistics = {name: RegionalGradient(W_RC) for name, W_RC in weights.items()}
    for i in range(block.count):
        with torch.enable_grad():
            norms = block.norms(i)
        for number, norm in enumerate(norms, 1):
            gradients = block.gradients_of(norm, again=number < len(norms))
            for name, statistic in statistics.items():
                statistic.update(gradients.get(name))
    return statistics


class RegionalGradient:
    """The statistic G of one weight.

    Args:
        like: Matrix [R, C] with the shape and the device of the weight.
    """

    def __init__(self, like: Tensor):
        self.squares_RC = torch.zeros_like(like, dtype=torch.float32)
        self.samples = 0

    def update(self, G_RC: Tensor | None) -> None:
        """Add the gradient of the norm of one sample's output; None where the sample did not use the weight."""
        self.samples += 1
        if G_RC is not None:
            self.squares_RC.addcmul_(G_RC, G_RC)

    def value(self) -> Tensor:
        """G [R, C]."""
        return (self.squares_RC / max(1, self.samples)).sqrt()
