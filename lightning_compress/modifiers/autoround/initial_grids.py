"""Where the descent begins: what is rounded at V = 0, and on which scales.

``rtn``: the weights themselves. ``gptq``: the values that GPTQ rounds, each column adjusted for the errors of those
before it, so that iterate 0 is GPTQ's solution and V moves around it.

Shapes: R rows, C columns, P partitions of a grouped convolution.
"""

from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from lightning_compress.layerwise.factor import factorize_each
from lightning_compress.modifiers.autoround.grid import LearnedGrid
from lightning_compress.modifiers.gptq.solver import ScaleSearch, Solver
from lightning_compress.quant.fake_quant import latent_of
from lightning_compress.quant.rounding import find_scales

__all__ = ["Start"]

DAMPENING = 0.01


@dataclass(frozen=True)
class Start:
    """How to begin.

    Args:
        gptq: From GPTQ's solution, else from the weights.
        scale_search: ``minmax``, ``mse`` or ``hessian``.
    """

    gptq: bool
    scale_search: ScaleSearch

    @property
    def needs_moments(self) -> bool:
        """Whether H is asked for."""
        return self.gptq or self.scale_search == "hessian"

    def __call__(
        self, W_RC: Tensor, args: QuantizationArgs, keep_RC: Tensor | None, H_PCC: Tensor | None
    ) -> LearnedGrid:
        """The grid at iterate 0.

        Args:
            W_RC: The dense weight, in its own dtype.
            args: The grid.
            keep_RC: False where a weight stays zero; None: nowhere.
            H_PCC: E[x x^T] of the inputs, by partition; None where it is not asked for.
        """
        if self.gptq:
            assert H_PCC is not None
            begun = self._gptq(W_RC, args, keep_RC, H_PCC)
            if begun is not None:
                return begun
        diagonal_C = None if H_PCC is None else H_PCC.diagonal(dim1=1, dim2=2).mean(0)
        return LearnedGrid(W_RC, *find_scales(W_RC, args, self.scale_search, diagonal_C), args, keep_RC)

    def _gptq(self, W_RC: Tensor, args: QuantizationArgs, keep_RC: Tensor | None, H_PCC: Tensor) -> LearnedGrid | None:
        """None where no damping makes H positive definite."""
        factors, _ = factorize_each(H_PCC, DAMPENING, by_size=True, retry=True)
        if factors is None:
            return None
        keep = torch.ones_like(W_RC, dtype=torch.bool) if keep_RC is None else keep_RC
        solved = Solver(args, self.scale_search)([W_RC], factors, [None], [keep])
        scale, zero_point = solved.scales[0]
        latent_RC = latent_of(solved.latents(factors), solved.Q_RC.to(W_RC.dtype), scale, zero_point, args)
        return LearnedGrid(latent_RC, scale, zero_point, args, keep_RC)
