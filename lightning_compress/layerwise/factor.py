"""H = E[x x^T], damped and factored in the order of the columns, for the sweeps of GPTQ and SparseGPT.

    H   = E[x x^T] + lambda I                          lambda = dampening_frac * mean(diag E[x x^T])
    H   = U diag(p)^2 U^T                              U upper triangular with ones on its diagonal
    a_j = w_j + sum_{k<j} (w_k - q_k) U_kj             the best value of column j, after the choice of q_k for all k < j
    (W - Q) H (W - Q)^T = sum_j p_j^2 (a_j - q_j)^2

The LDL form of Chee et al., 2023 (QuIP, arXiv:2307.13304): one Cholesky factorization and no inverse. In the letters of
GPTQ and SparseGPT, whose U' is the Cholesky factor of the inverse, 1 / U'_jj = p_j.

Shapes: R rows, C columns (inputs).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Factor", "added_diagonal", "energy", "factorize", "factorize_retrying", "undamped_energy"]

MAX_DAMPENING = 1.0
ROWS = 64


@dataclass(frozen=True)
class Factor:
    """H = E[x x^T] + diag(added), factored in the order in which columns are rounded.

    Args:
        order_C: Columns in the order of rounding.
        UT_CC: U^T: row j holds the factors for column j of the errors of earlier columns.
        pivot_C: p_j.
        diagonal_C: H_jj of each column (not in that order).
        added_C: Damping on the diagonal, for each column (not in that order).
        dampening: The fraction of the mean diagonal that was needed.
    """

    order_C: Tensor
    UT_CC: Tensor
    pivot_C: Tensor
    diagonal_C: Tensor
    added_C: Tensor
    dampening: float


def factorize(H_CC: Tensor, dampening: float, by_size: bool) -> Factor | None:
    """Factor H with ``dampening * mean(diag H)`` added to its diagonal; None when it is not positive definite.

    Args:
        H_CC: E[x x^T], float32 or float64, both triangles.
        dampening: Fraction of the mean diagonal.
        by_size: Round columns in order of falling H_jj, else from left to right.
    """
    diagonal_C = H_CC.diagonal()
    order_C = torch.arange(len(H_CC), device=H_CC.device)
    if by_size:
        order_C = diagonal_C.argsort(descending=True, stable=True)
    added_C = added_diagonal(H_CC, dampening)
    damped_C = diagonal_C + added_C
    # H = R R^T with R upper triangular is the Cholesky factorization of H read backwards: one, and no inverse
    backwards, RT_CC = order_C.flip(0), torch.empty_like(H_CC)
    for low in range(0, len(H_CC), step := _rows_at_once(H_CC)):  # all of it in the memory of one matrix beside H
        rows = slice(low, low + step)
        RT_CC[rows] = H_CC.index_select(0, backwards[rows]).index_select(1, backwards)
    RT_CC.diagonal().copy_(damped_C[backwards])
    failed = torch.empty((), device=H_CC.device, dtype=torch.int32)
    torch.linalg.cholesky_ex(RT_CC.t(), out=(RT_CC.t(), failed))  # as LAPACK has it, column by column: no copy
    _reverse_(RT_CC)
    pivot_C = RT_CC.diagonal().clone()
    # Rounding leaves a pivot of about eps * H_jj where the true one is zero. Undamped, C such errors may add up.
    eps = torch.finfo(H_CC.dtype).eps * (len(H_CC) if dampening == 0 else 1)
    if (failed != 0) | ~(pivot_C.square() > eps * damped_C[order_C]).all():  # one wait for a GPU, not two
        return None
    return Factor(order_C, RT_CC.div_(pivot_C[:, None]), pivot_C, damped_C, added_C, dampening)


def _reverse_(M_CC: Tensor) -> None:
    """Turn the order of rows and columns around, in place."""
    C = len(M_CC)
    middle = (C + 1) // 2
    for low in range(0, middle, step := _rows_at_once(M_CC)):
        high = min(low + step, middle)
        first, last = M_CC[low:high].flip(0, 1), M_CC[C - high : C - low].flip(0, 1)
        M_CC[C - high : C - low] = first
        M_CC[low:high] = last


def _rows_at_once(M_CC: Tensor) -> int:
    """Rows that are copied at once: a GPU would wait for many launches."""
    return ROWS if M_CC.device.type == "cpu" else len(M_CC)


def added_diagonal(H_CC: Tensor, dampening: float) -> Tensor:
    """The damping on the diagonal of H, [C]: ``dampening * mean(diag H)``."""
    diagonal_C = H_CC.diagonal()
    added_C = (dampening * diagonal_C.mean()).expand_as(diagonal_C)
    return torch.where((diagonal_C == 0) & (added_C == 0), 1.0, added_C)  # no input, no damping: any positive number


def factorize_retrying(H_CC: Tensor, dampening: float, by_size: bool, retry: bool) -> tuple[Factor | None, float]:
    """Factor H, where it is not positive definite with ten times the damping, up to 1.0.

    Args:
        H_CC: E[x x^T], float32 or float64, both triangles.
        dampening: Fraction of the mean diagonal to begin with.
        by_size: True: columns in order of falling H_jj.
        retry: False: only the first damping is tried.

    Returns:
        The factor, or None when no damping helps, and the last damping that was tried.
    """
    while True:
        factor = factorize(H_CC, dampening, by_size)
        if factor is not None or not retry or dampening >= MAX_DAMPENING:
            return factor, dampening
        dampening = min(MAX_DAMPENING, max(10 * dampening, 0.01))


def energy(W_RC: Tensor, factor: Factor, block: int = 128) -> Tensor:
    """W H w^T of each row with the damped H, [R], by the triangle of the factor: half the work of W H."""
    W_RC = W_RC.index_select(1, factor.order_C)
    R, C = W_RC.shape
    sum_R = W_RC.new_zeros(R)
    for i1 in range(0, C, block):
        i2 = min(i1 + block, C)
        sum_R += (W_RC[:, :i2] @ factor.UT_CC[i1:i2, :i2].t()).square_() @ factor.pivot_C[i1:i2].square()
    return sum_R


def undamped_energy(W_RC: Tensor, factor: Factor) -> float:
    """The trace of W H W^T with H as it was before damping."""
    return float((energy(W_RC, factor) - W_RC.square() @ factor.added_C).sum())
