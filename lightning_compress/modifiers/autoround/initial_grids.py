"""Iterate 0 of the descent: the values that are rounded at V = 0, and their scales.

``rtn``: the weights themselves. ``gptq``: the values that GPTQ rounds, each column adjusted for the errors of those
before it, so that iterate 0 is GPTQ's solution and V varies around it.

Shapes: R rows, C columns, P partitions of a grouped convolution.
"""

from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from lightning_compress.layerwise.factor import factorize_retrying
from lightning_compress.modifiers.autoround.grid import LearnedGrid
from lightning_compress.modifiers.gptq.solver import Matrix, ScaleSearch, Solver, adjusted, rows_of
from lightning_compress.quant.fake_quant import latent_of
from lightning_compress.quant.rounding import find_scales

__all__ = ["Start"]

DAMPENING = 0.01


@dataclass(frozen=True)
class Start:
    """Settings of iterate 0.

    Args:
        gptq: True: GPTQ's solution; False: the weights, rounded to nearest.
        scale_search: ``minmax``, ``mse`` or ``hessian``.
    """

    gptq: bool
    scale_search: ScaleSearch

    @property
    def needs_hessian(self) -> bool:
        """True where H is needed."""
        return self.gptq or self.scale_search == "hessian"

    def __call__(
        self,
        W_RC: Tensor,
        args: QuantizationArgs,
        keep_RC: Tensor | None,
        H_PCC: Tensor | None,
        global_scale: Tensor | None = None,
    ) -> LearnedGrid:
        """The grid at iterate 0.

        Args:
            W_RC: The dense weight, in the dtype of the layer.
            args: The grid.
            keep_RC: False where a weight stays zero; None: nowhere.
            H_PCC: E[x x^T] of the inputs, by partition; None where it is not needed.
            global_scale: g of NVFP4.
        """
        if self.gptq:
            assert H_PCC is not None
            grid = self._gptq(W_RC, args, keep_RC, H_PCC, global_scale)
            if grid is not None:
                return grid
        diagonal_C = None if H_PCC is None else H_PCC.diagonal(dim1=1, dim2=2).mean(0)
        scales = find_scales(W_RC, args, self.scale_search, diagonal_C, global_scale)
        return LearnedGrid(W_RC, *scales, args, keep_RC, global_scale)

    def _gptq(
        self, W_RC: Tensor, args: QuantizationArgs, keep_RC: Tensor | None, H_PCC: Tensor, global_scale: Tensor | None
    ) -> LearnedGrid | None:
        """None where no damping makes H positive definite."""
        P, R, solver = len(H_PCC), len(W_RC), Solver(args, self.scale_search)
        factors = [factorize_retrying(H_CC, DAMPENING, by_size=True, retry=True)[0] for H_CC in H_PCC]
        factor_P = [factor for factor in factors if factor is not None]
        if len(factor_P) < P:
            return None
        keep_RC = torch.ones_like(W_RC, dtype=torch.bool) if keep_RC is None else keep_RC
        common = solver.common_scales(W_RC, factor_P, global_scale) if P > 1 else None
        latents, solutions = [], []
        for p, (W, keep, factor) in enumerate(zip(W_RC.chunk(P), keep_RC.chunk(P), factor_P, strict=True)):
            fixed = None if common is None else rows_of(common, slice(p * R // P, (p + 1) * R // P), R, args)
            (solved,) = solver([Matrix(W, keep, global_scale, fixed)], factor)
            latents.append(adjusted(solved.W_RC, solved.Q_RC, factor) * keep)
            solutions.append(solved)
        zeros = [one.zero_point for one in solutions if one.zero_point is not None]
        scales = torch.cat([one.scale for one in solutions]), torch.cat(zeros) if zeros else None
        scale, zero_point = common or scales
        Q_RC = torch.cat([one.Q_RC for one in solutions]).to(W_RC.dtype)
        latent_RC = latent_of(torch.cat(latents), Q_RC, scale, zero_point, args)
        return LearnedGrid(latent_RC, scale, zero_point, args, keep_RC, global_scale)
