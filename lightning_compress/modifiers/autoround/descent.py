"""Sign descent on the error of a block's output, all weights of the block together.

    V <- V - lr_t sign(dL/dV),   lr_t = lr (1 - t / iters)            alpha, beta likewise

Each step computes L on a few batches, in the order of a seeded generator, each batch equally often. The best iterate is
that with the least L divided by L of iterate 0 on the same batches, since batches differ more than iterates do. At the
end iterate 0, the best and the last one are compared on all batches, so that the result is never worse than iterate 0.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_compress.modifiers.autoround.block import LearnedBlock
from lightning_compress.modifiers.autoround.grid import LearnedGrid, OnGrid

__all__ = ["Descent", "Result", "descend", "drawn"]

W = TypeVar("W")


@dataclass(frozen=True)
class Descent:
    """Settings of the descent.

    Args:
        iters: Number of steps.
        rate: lr.
        samples: Samples in each step, at least, in whole batches.
        seed: Seed of the order of batches.
    """

    iters: int
    rate: float
    samples: int
    seed: int


class Result(NamedTuple, Generic[W]):
    """The best weights of a block.

    Args:
        weights: Weights by name.
        began: Squared error of the block's output on all batches with the initial weights.
        ended: Squared error with ``weights``.
    """

    weights: dict[str, W]
    began: float
    ended: float


def descend(
    grids: Mapping[str, LearnedGrid], block: LearnedBlock, how: Descent, others: Sequence[dict[str, OnGrid]] = ()
) -> Result[OnGrid]:
    """Learn the rounding of a block's weights, and write the best weights into the block.

    Args:
        grids: The weights by name, V = 0: iterate 0.
        block: Their block, inside of :meth:`LearnedBlock.learning`.
        how: Settings of the descent.
        others: Weights that compete with the result, such as those rounded to nearest.
    """
    start = best = last = {name: grid.now() for name, grid in grids.items()}
    block.place(start)
    each = [float(block.error(i)) for i in range(block.count)]
    least = 1.0  # L / L of iterate 0
    order = drawn(block.count, how.seed)
    for t in range(how.iters if sum(each) > 0 else 0):
        batches = _some(order, block, how.samples)
        error, sums = _error_and_gradients(block, batches)
        before = sum(each[i] for i in batches)
        if before > 0 and error / before < least:
            least, best = error / before, last
        for name, gradient_RC in sums.items():
            grids[name].step(gradient_RC, how.rate * (1 - t / how.iters))
        last = {name: grid.now() for name, grid in grids.items()}
        block.place(last)
    weights, ended = start, sum(each)
    for candidate in [weights for weights in (last, best) if weights is not start] + list(others):
        block.place(candidate)
        error = sum(float(block.error(i)) for i in range(block.count))
        if error < ended:
            weights, ended = candidate, error
    block.place(weights)
    return Result(weights, sum(each), ended)


def drawn(count: int, seed: int) -> Iterator[int]:
    """Endless random numbers below ``count``: one permutation after another."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator, device="cpu").tolist()


def _some(order: Iterator[int], block: LearnedBlock, samples: int) -> list[int]:
    """The next batches that hold at least so many samples, or all batches."""
    batches = [next(order)]
    while sum(map(block.samples, batches)) < samples and len(batches) < block.count:
        batches.append(next(order))
    return batches


def _error_and_gradients(block: LearnedBlock, batches: Sequence[int]) -> tuple[float, dict[str, Tensor]]:
    """The error and its gradients, summed over batches."""
    total, sums = 0.0, dict[str, Tensor]()
    for i in batches:
        with torch.enable_grad():
            error = block.error(i)
        total += float(error)
        for name, gradient_RC in block.gradients(error).items():
            sums[name] = sums[name] + gradient_RC if name in sums else gradient_RC
    return total, sums
