"""Refine a weight that is on its grid already: better scales for its codes, better codes for its scales.

Both lower J(Q) = (W - Q) H (W - Q)^T row by row, and never raise it. With P = (W - Q) H and Q_rj = s_rg v_rj:

    scales   s_rg += (v_rg . P_rg) / (v_rg H_gg v_rg^T)        the exact minimum over one scale, codes fixed
    codes    q_rj <- nearest grid point to q_rj + P_rj / H_jj  the exact minimum over one code, all others fixed

The first is the closed-form refit of two-stage grid optimisation, the second coordinate descent on the codes (Nair &
Suggala, 2024, CDQuant, arXiv:2406.17542; Behdin et al., 2023, QuantEase, arXiv:2309.01885). H should be the damped
one; without damping the refinement fits noise of the calibration data.

Shapes: R rows, C columns, G groups of g columns.
"""

from collections.abc import Sequence

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from lightning_compress.modifiers.gptq.solver import Matrix, OnGrid, Solver, grid_of, keep_of
from lightning_compress.ops.gptq_block import Block, Rounding, gptq_block_
from lightning_compress.quant.scales import expand, group_columns

__all__ = ["improve_codes", "is_refinable", "refine", "refined", "refit_scales", "weighted_error"]

SMALLEST = 0.25  # a refit never lowers a scale below this share of it: other codes would be nearer
BLOCK = 128


def refined(solver: Solver, solved: Sequence[OnGrid], matrices: Sequence[Matrix], H_CC: Tensor) -> list[OnGrid]:
    """Solutions with scales refitted and codes improved, where that lowers the loss of a row.

    Args:
        solver: Solver that gave the solutions.
        solved: The solutions.
        matrices: The weights.
        H_CC: The damped H.
    """
    args, dtype, rows = solver.args, matrices[0].W_RC.dtype, [len(matrix.W_RC) for matrix in matrices]
    W_RC, Q_RC = torch.cat([one.W_RC for one in solved]), torch.cat([one.Q_RC for one in solved])
    scale_RG, zero_RG = solver.by_row([(one.scale, one.zero_point) for one in solved], matrices)
    Q_RC, scale_RG, loss_R = refine(W_RC, Q_RC, scale_RG, zero_RG, args, H_CC, dtype, keep_of(matrices))
    scales = [scale.contiguous() for scale in scale_RG.to(dtype).split(rows)]
    pieces = zip(solved, Q_RC.split(rows), loss_R.split(rows), scales, strict=True)
    return [OnGrid(one.W_RC, Q, loss, scale, one.zero_point) for one, Q, loss, scale in pieces]


def refine(
    W_RC: Tensor,
    Q_RC: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    args: QuantizationArgs,
    H_CC: Tensor,
    dtype: torch.dtype,
    keep_RC: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Refit the scales, improve the codes, refit the scales; rows whose J does not fall keep Q.

    Args:
        W_RC: The dense weight, float32.
        Q_RC: Points of the grid, float32.
        scale: [R, G], [R, 1] or [1], positive.
        zero_point: Zero points in the shape of ``scale``, or None.
        args: The grid, of integers.
        H_CC: E[x x^T], damped, float32, both triangles.
        dtype: Dtype in which scales are stored.
        keep_RC: False where Q is zero and stays zero; None: nowhere.

    Returns:
        Q [R, C], scales [R, G] that hold in ``dtype``, float32, and J of each row, [R].

    Raises:
        ValueError: The grid is not one of integers, or all rows share one scale.
    """
    if not is_refinable(args):
        raise ValueError(f"expected integers with a scale for each row, got {args.type} per {args.strategy}")
    start_RG = expand(scale, len(W_RC), args).float()
    new_RC, scale_RG = refit_scales(W_RC, Q_RC, start_RG, args, H_CC, dtype)
    new_RC = improve_codes(W_RC, new_RC, scale_RG, zero_point, args, H_CC, dtype, keep_RC)
    new_RC, scale_RG = refit_scales(W_RC, new_RC, scale_RG, args, H_CC, dtype)
    before_R, after_R = weighted_error(W_RC, Q_RC, H_CC), weighted_error(W_RC, new_RC, H_CC)
    gains_R1 = (after_R < before_R)[:, None]
    return new_RC.where(gains_R1, Q_RC), scale_RG.where(gains_R1, start_RG), torch.minimum(after_R, before_R)


def is_refinable(args: QuantizationArgs) -> bool:
    """True for integers with scales that rows do not share."""
    return args.type == "int" and args.strategy in ("group", "channel")


def weighted_error(W_RC: Tensor, Q_RC: Tensor, H_CC: Tensor) -> Tensor:
    """J of each row, [R]."""
    E_RC = W_RC - Q_RC
    return ((E_RC @ H_CC) * E_RC).sum(1)


def refit_scales(
    W_RC: Tensor,
    Q_RC: Tensor,
    scale_RG: Tensor,
    args: QuantizationArgs,
    H_CC: Tensor,
    dtype: torch.dtype,
    sweeps: int = 2,
) -> tuple[Tensor, Tensor]:
    """Q and its scales after ``sweeps`` over the groups; steps that raise J once rounded to ``dtype`` are left out.

    Arguments and results as for :func:`refine`.
    """
    g = group_columns(args, Q_RC.shape[1])
    V_RC = (Q_RC / scale_RG.repeat_interleave(g, 1)).round_()
    P_RC = (W_RC - Q_RC) @ H_CC
    scale_RG = scale_RG.clone()
    for group in list(range(scale_RG.shape[1])) * sweeps:
        columns = slice(group * g, (group + 1) * g)
        v_Rg, s_R = V_RC[:, columns], scale_RG[:, group]
        slope_R = (v_Rg * P_RC[:, columns]).sum(1)
        curvature_R = ((v_Rg @ H_CC[columns, columns]) * v_Rg).sum(1)
        new_R = (s_R + slope_R / curvature_R.clamp(min=torch.finfo(torch.float32).tiny)).to(dtype).float()
        step_R = new_R - s_R
        gain_R = step_R * (2 * slope_R - step_R * curvature_R)
        step_R = step_R.where((gain_R > 0) & (new_R > SMALLEST * s_R) & new_R.isfinite(), 0.0)
        scale_RG[:, group] += step_R
        P_RC -= (step_R[:, None] * v_Rg) @ H_CC[columns]
    return V_RC * scale_RG.repeat_interleave(g, 1), scale_RG


def improve_codes(
    W_RC: Tensor,
    Q_RC: Tensor,
    scale_RG: Tensor,
    zero_point: Tensor | None,
    args: QuantizationArgs,
    H_CC: Tensor,
    dtype: torch.dtype,
    keep_RC: Tensor | None = None,
    sweeps: int = 2,
) -> Tensor:
    """Q after ``sweeps`` over its columns, each column at its best given all others. Arguments as for :func:`refine`.

    With a_j = q_j + P_j / H_jj, the change d_j of q_j adds d_j H_jk / H_kk to a_k. Within 128 columns that is a block
    of GPTQ (ops/gptq_block) whose errors are the changes; a GEMM updates P for all columns.
    """
    R, C = W_RC.shape
    g, grid = group_columns(args, C), grid_of(args, dtype)
    Q_CR = Q_RC.t().contiguous()
    P_CR = H_CC @ (W_RC - Q_RC).t()
    scale_GR = scale_RG.t().contiguous()
    zero_GR = None if zero_point is None else expand(zero_point, R, args).float().t().contiguous()
    group_C = torch.arange(C, device=Q_CR.device, dtype=torch.int64) // g
    keep_CR = None if keep_RC is None else keep_RC.t().contiguous()
    inverse_C1 = H_CC.diagonal().reciprocal()[:, None]
    for i1 in list(range(0, C, BLOCK)) * sweeps:
        b = slice(i1, min(i1 + BLOCK, C))
        A_bR = torch.addcmul(Q_CR[b], P_CR[b], inverse_C1[b])
        D_bR, new_bR = torch.empty_like(A_bR), torch.empty_like(A_bR)
        keep_bR = None if keep_CR is None else keep_CR[b]
        columns = Block(A_bR, new_bR, D_bR, Q_CR[b], H_CC[b, b] * inverse_C1[b].t(), keep_bR)
        gptq_block_(columns, Rounding(grid, scale_GR, zero_GR, group_C[b]))
        Q_CR[b] = new_bR
        P_CR.addmm_(H_CC[:, b], D_bR)
    return Q_CR.t().contiguous()
