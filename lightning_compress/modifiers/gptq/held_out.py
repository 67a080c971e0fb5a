"""What GPTQ chooses on held-out data: the damping, and whether refinement lowers the error.

Calibration batches go in turns into two halves, A and B. Some rows are solved with the H of A and judged by their error
with the H of B, (W - Q) H_B (W - Q)^T. All rows are then solved with the best choice and the H of both halves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_compress.layerwise.factor import Factor, factorize_retrying
from lightning_compress.modifiers.gptq.refinement import refined, weighted_error
from lightning_compress.modifiers.gptq.solver import Matrix, OnGrid, Solver

__all__ = ["DAMPENINGS", "Choice", "choose", "damped"]

DAMPENINGS = (0.01, 0.03, 0.1, 0.3)
ROWS = 64


@dataclass(frozen=True)
class Choice:
    """The choice with the least error on B.

    Args:
        dampening: Share of the mean diagonal of H.
        refine: True where refinement lowered the error.
    """

    dampening: float
    refine: bool


@torch.no_grad()
def choose(
    solver: Solver,
    matrices: Sequence[Matrix],
    halves: tuple[Tensor, Tensor],
    dampenings: Sequence[float],
    by_size: bool,
    refine: bool,
) -> Choice | None:
    """Solve some rows on A, judge them on B; None when no damping makes H of A positive definite.

    Args:
        solver: Solver of these weights.
        matrices: The weights.
        halves: H of A and H of B, [C, C] each.
        dampenings: Shares of damping to choose from.
        by_size: True: columns in order of falling H_jj.
        refine: True: refinement may be chosen.
    """
    A_CC, B_CC = halves
    matrices = [_some_rows(matrix, solver, ROWS // len(matrices)) for matrix in matrices]
    best: tuple[float, Choice] | None = None
    for dampening in dampenings:
        factor, _ = factorize_retrying(A_CC, dampening, by_size, retry=False)
        if factor is None:
            continue
        solved = solver(matrices, factor)
        error, refines = _error_on(solved, B_CC), False
        if refine:
            error_refined = _error_on(refined(solver, solved, matrices, damped(A_CC, factor)), B_CC)
            error, refines = min(error, error_refined), error_refined < error
        if best is None or error < best[0]:
            best = error, Choice(dampening, refines)
    return None if best is None else best[1]


def damped(H_CC: Tensor, factor: Factor) -> Tensor:
    """A copy of H with the damping of a factor, [C, C]."""
    H_CC = H_CC.clone()
    H_CC.diagonal().add_(factor.added_C)
    return H_CC


def _error_on(solved: Sequence[OnGrid], H_CC: Tensor) -> float:
    """The trace of (W - Q) H (W - Q)^T over all weights."""
    W_RC, Q_RC = torch.cat([one.W_RC for one in solved]), torch.cat([one.Q_RC for one in solved])
    return float(weighted_error(W_RC, Q_RC, H_CC).sum())


def _some_rows(matrix: Matrix, solver: Solver, count: int) -> Matrix:
    """Rows spread over a weight; all of them where rows share a scale."""
    R = len(matrix.W_RC)
    if solver.args.strategy in ("tensor", "block"):
        return matrix
    rows = (
        torch.linspace(0, R - 1, min(R, max(1, count)), dtype=torch.float32, device="cpu")
        .round()
        .long()
        .to(matrix.W_RC.device)
    )
    return replace(matrix, W_RC=matrix.W_RC[rows], keep_RC=None if matrix.keep_RC is None else matrix.keep_RC[rows])
