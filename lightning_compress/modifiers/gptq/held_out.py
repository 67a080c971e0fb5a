"""What GPTQ chooses on data that it was not fitted to: the damping, and whether refinement is worth it.

Calibration batches go in turns into two halves, A and B. Some rows are solved with the H of A and judged by their error
with the H of B, (W - Q) H_B (W - Q)^T. What wins is then done to all rows with the H of both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.layerwise.factor import factorize_each
from lightning_compress.modifiers.gptq.solver import Solver, damped, error_on

__all__ = ["DAMPENINGS", "Choice", "choose"]

DAMPENINGS = (0.01, 0.03, 0.1, 0.3)
ROWS = 64


@dataclass(frozen=True)
class Choice:
    """What did best on B.

    Args:
        dampening: Share of the mean diagonal of H.
        refine: Refinement lowered the error.
    """

    dampening: float
    refine: bool


@torch.no_grad()
def choose(
    solver: Solver,
    matrices: Sequence[Tensor],
    global_scales: Sequence[Tensor | None],
    keeps: Sequence[Tensor],
    A_PCC: Tensor,
    B_PCC: Tensor,
    dampenings: Sequence[float],
    by_size: bool,
    refine: bool,
) -> Choice | None:
    """Solve some rows on A, judge them on B; None when no damping makes H of A positive definite.

    Args:
        solver: For these modules.
        matrices: The weight of each module, [rows, C].
        global_scales: By module, or None.
        keeps: False where a weight is to stay zero, by module.
        A_PCC: H of one half.
        B_PCC: H of the other.
        dampenings: What to choose from.
        by_size: Columns in order of falling H_jj.
        refine: Whether refinement is wanted at all.
    """
    each_R = [_some_rows(len(W_RC), len(A_PCC), solver, ROWS // len(matrices)).to(W_RC.device) for W_RC in matrices]
    matrices = [W_RC[rows] for W_RC, rows in zip(matrices, each_R, strict=True)]
    keeps = [keep[rows] for keep, rows in zip(keeps, each_R, strict=True)]
    best: tuple[float, Choice] | None = None
    for dampening in dampenings:
        factors, _ = factorize_each(A_PCC, dampening, by_size, retry=False)
        if factors is None:
            continue
        solved = solver(matrices, factors, global_scales, keeps)
        error, better = float(error_on(solved.W_RC, solved.Q_RC, B_PCC).sum()), False
        if refine:
            again = solver.refined(solved, damped(A_PCC, factors), matrices[0].dtype)
            refined = float(error_on(again.W_RC, again.Q_RC, B_PCC).sum())
            error, better = min(error, refined), refined < error
        if best is None or error < best[0]:
            best = error, Choice(dampening, better)
    return None if best is None else best[1]


def _some_rows(rows: int, partitions: int, solver: Solver, wanted: int) -> Tensor:
    """Rows spread over a matrix, as many of each partition; all of them where rows share a scale."""
    if solver.args.strategy in ("tensor", "block"):
        return torch.arange(rows)
    within = rows // partitions
    take = min(within, max(1, wanted // partitions))
    chosen = torch.linspace(0, within - 1, take, dtype=torch.float32).round().long()
    return (torch.arange(partitions)[:, None] * within + chosen).flatten()
