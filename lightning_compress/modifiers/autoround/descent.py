"""Sign descent on the error of a block's output, all weights of the block together.

    V <- V - lr_t sign(dL/dV),   lr_t = lr (1 - t / iters)            alpha, beta likewise

L is taken on a few batches a step, in the order of a seeded generator, each batch as often as any other. Which iterate
is best is judged by L divided by what iterate 0 loses on the same batches, since batches differ more than iterates do.
In the end iterate 0, the best and the last one are compared on all batches, so that nothing ends worse than it began.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.modifiers.autoround.block import LearnedBlock
from lightning_compress.modifiers.autoround.grid import LearnedGrid, OnGrid

__all__ = ["Descent", "Result", "descend"]


@dataclass(frozen=True)
class Descent:
    """How to go down.

    Args:
        iters: Steps; 0: none.
        rate: lr.
        samples: So many a step, in whole batches.
        seed: Of the order of batches.
    """

    iters: int
    rate: float
    samples: int
    seed: int


@dataclass(frozen=True)
class Result:
    """What came out.

    Args:
        weights: Every weight on its grid.
        began: The error of iterate 0 on all batches.
        ended: That of ``weights``.
    """

    weights: dict[str, OnGrid]
    began: float
    ended: float


def descend(
    grids: Mapping[str, LearnedGrid], block: LearnedBlock, how: Descent, others: Sequence[dict[str, OnGrid]] = ()
) -> Result:
    """Learn the rounding of a block's weights; the best weights are in place in the end.

    Args:
        grids: The weights by name, V = 0: iterate 0.
        block: Where they work, between the two ends of :meth:`LearnedBlock.learning`.
        how: Steps, rate, samples a step, seed.
        others: Weights that must not be better than the result, such as those rounded to nearest.
    """
    start = best = last = {name: grid.now() for name, grid in grids.items()}
    block.place(start)
    each = [float(block.error(i)) for i in range(block.count)]
    least = 1.0  # L / L of iterate 0
    order = drawn(block.count, how.seed)
    for t in range(how.iters if sum(each) > 0 else 0):
        picked = _some(order, block, how.samples)
        error, sums = _error_and_gradients(block, picked)
        before = sum(each[i] for i in picked)
        if before > 0 and error / before < least:
            least, best = error / before, last
        for name, gradient_RC in sums.items():
            grids[name].step(gradient_RC, how.rate * (1 - t / how.iters))
        last = {name: grid.now() for name, grid in grids.items()}
        block.place(last)
    weights, ended = start, sum(each)
    for tried in [weights for weights in (last, best) if weights is not start] + list(others):
        block.place(tried)
        error = sum(float(block.error(i)) for i in range(block.count))
        if error < ended:
            weights, ended = tried, error
    block.place(weights)
    return Result(weights, sum(each), ended)


def drawn(count: int, seed: int) -> Iterator[int]:
    """Numbers below ``count`` without end: all of them in random order, then all of them in another one."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _some(order: Iterator[int], block: LearnedBlock, samples: int) -> list[int]:
    """The next batches, until they hold so many samples, or all of them."""
    picked = [next(order)]
    while sum(map(block.samples, picked)) < samples and len(picked) < block.count:
        picked.append(next(order))
    return picked


def _error_and_gradients(block: LearnedBlock, picked: Sequence[int]) -> tuple[float, dict[str, Tensor]]:
    """Summed over some batches, one after the other."""
    total, sums = 0.0, dict[str, Tensor]()
    for i in picked:
        with torch.enable_grad():
            error = block.error(i)
        total += float(error)
        for name, gradient_RC in block.gradients(error).items():
            sums[name] = sums[name] + gradient_RC if name in sums else gradient_RC
    return total, sums
