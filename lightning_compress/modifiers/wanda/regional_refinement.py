"""Refine the weights of a pruned block (Wanda++, Yang et al., 2025, arXiv:2503.04992).

    K times:  prune W;  M times:  v <- 0.99 v + 0.01 g^2,   W <- W - lr g / (sqrt(v) + eps)              RMSprop
    prune W

g is the gradient of the squared error of the block's output on one calibration batch. All weights train until the next
pruning, pruned ones too. The best pruned block is that with the least error on all batches.

Shapes: R rows (out features), C columns (in features).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.modifiers.autoround.block import LearnedBlock
from lightning_compress.modifiers.autoround.descent import Result, drawn

__all__ = ["RMSprop", "Refinement", "refine"]


@dataclass(frozen=True)
class Refinement:
    """Settings of the refinement.

    Args:
        rounds: K; 0: only prune.
        steps: M.
        rate: lr.
        seed: Seed of the order of batches.
    """

    rounds: int
    steps: int
    rate: float
    seed: int


def refine(
    block: LearnedBlock,
    dense: Mapping[str, Tensor],
    rival: Mapping[str, Tensor],
    prune: Callable[[str, Tensor, bool], Tensor],
    how: Refinement,
) -> Result[Tensor]:
    """Prune the weights of a block together; ``began`` of the result is the error of ``rival``.

    Args:
        block: The block, inside of :meth:`LearnedBlock.learning`.
        dense: Its weights by name, [R, C]; zeros stay.
        rival: Pruned weights that compete with the result, where there are rounds.
        prune: ``prune(name, W, first)`` gives the pruned weight, as it is stored, of W, float32; ``first``: W is dense.
        how: Settings of the refinement.
    """
    began = ended = _error(block, rival)
    weights = dict(rival)
    W = {name: W_RC.float() for name, W_RC in dense.items()}
    nonzero = {name: W_RC != 0 for name, W_RC in dense.items()}
    optimizers = {name: RMSprop(W_RC, how.rate) for name, W_RC in W.items()}
    order = drawn(block.count, how.seed)
    for round_ in range(how.rounds + 1):
        pruned = {name: prune(name, W_RC, round_ == 0) for name, W_RC in W.items()}
        error = _error(block, pruned)
        if error < ended or not how.rounds:
            weights, ended = pruned, error
        if round_ == how.rounds:
            break
        W = {name: Q_RC.float().clone() for name, Q_RC in pruned.items()}
        for _ in range(how.steps):
            with torch.enable_grad():
                loss = block.error(next(order))
            for name, g_RC in block.gradients(loss).items():
                optimizers[name].step(W[name], g_RC * nonzero[name])
            block.write(W)
    return Result(weights, began, ended)


class RMSprop:
    """Steps of one weight, as in torch.optim.RMSprop, from gradients outside of ``.grad``.

    Args:
        like: Tensor with the shape and the device of the weight.
        rate: lr.
    """

    DECAY, EPS = 0.99, 1e-8

    def __init__(self, like: Tensor, rate: float):
        self.v_RC, self.rate = torch.zeros_like(like, dtype=torch.float32), rate

    def step(self, W_RC: Tensor, g_RC: Tensor) -> None:
        """Update W, float32, in place."""
        self.v_RC.mul_(self.DECAY).addcmul_(g_RC, g_RC, value=1 - self.DECAY)
        W_RC.addcdiv_(g_RC, self.v_RC.sqrt().add_(self.EPS), value=-self.rate)


def _error(block: LearnedBlock, weights: Mapping[str, Tensor]) -> float:
    """Write weights into the block; the squared error of its output on all batches."""
    block.write(weights)
    return sum(float(block.error(i)) for i in range(block.count))
