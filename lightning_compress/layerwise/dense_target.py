"""Weights that come near the outputs of the dense model, on inputs that come from compressed layers.

    E||W x_dense - Q x||^2 = (W* - Q) H (W* - Q)^T + a constant,    W* = W + W S,  S = D H^-1,  D = E[(x_dense - x) x^T]

so that any solver for the error of a layer can round or prune W* (the target of GPTAQ, Li et al. 2025,
arXiv:2504.02692, and of Qronos, Zhang et al. 2025, arXiv:2505.11695). S fits the noise of few tokens, too. So H is
damped for it by a tenth of its mean diagonal, and the weights take only a share a of the step: the one with the least
error on held-out batches, with S of the other ones. With both halves A and B of the batches:

    a = tr(W D_B (W S_A)^T) / tr(W S_A H_B (W S_A)^T)          above and below the line added up with A, B exchanged

Where that is not positive, the dense model's target would do harm on the held-out batches, and W stays as it is.

Shapes: R rows (outputs), C columns (inputs).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_compress.layerwise.factor import Factor, factorize_retrying
from lightning_compress.layerwise.layer import Hessian, Layer

__all__ = ["Target", "dense_step", "moved"]

Target = Literal["layer", "dense"]
"""The output of the layer for the inputs that it gets, or that of the dense model."""

DAMPENING = 0.1
ROWS = 64  # that the share is chosen by
REFUSED = "dense target refused on held-out batches"


def dense_step(hessian: Hessian, layers: Sequence[Layer]) -> tuple[Tensor | None, str | None]:
    """The step a S, [C, C], or None where the weights stay; and a note for the ledger.

    Args:
        hessian: H and D of the inputs, with both halves.
        layers: The layers whose error on held-out batches decides.
    """
    if hessian.D_CC is None:
        return None, "dense inputs not known: target of the layer"
    if not hessian.D_CC.any():  # inputs are those of the dense model
        return None, None
    if hessian.halves is None or hessian.D_halves is None:
        return None, "one calibration batch: nothing held out to choose the target by"
    W_RC = torch.cat([_some_rows(layer.W_RC, ROWS // len(layers)) for layer in layers]).float()
    (A, B), (D_A, D_B) = hessian.halves, hessian.D_halves
    gain = size = 0.0
    for H_CC, D_CC, H_other, D_other in ((A, D_A, B, D_B), (B, D_B, A, D_A)):
        factor, _ = factorize_retrying(H_CC, DAMPENING, by_size=False, retry=True)
        if factor is None:
            return None, REFUSED
        step_RC = over_hessian(W_RC @ D_CC, factor)
        gain += float(((W_RC @ D_other) * step_RC).sum())
        size += float(((step_RC @ H_other) * step_RC).sum())
    share = min(gain / size, 1.0) if size > 0 else 0.0
    factor, _ = factorize_retrying(hessian.H_CC, DAMPENING, by_size=False, retry=True)
    if not share > 0 or factor is None:
        return None, REFUSED
    return over_hessian(hessian.D_CC, factor).mul_(share), f"dense target {share:.2f}"


def moved(W_RC: Tensor, step_CC: Tensor | None) -> Tensor:
    """W + W S in the dtype of W; without a step W itself."""
    return W_RC if step_CC is None else torch.addmm(W_RC.float(), W_RC.float(), step_CC).to(W_RC.dtype)


def over_hessian(M_RC: Tensor, factor: Factor) -> Tensor:
    """M H^-1 with the damped H of a factor whose columns are in their own order."""
    M_RC = torch.linalg.solve_triangular(factor.UT_CC, M_RC, upper=False, left=False, unitriangular=True)
    M_RC.div_(factor.pivot_C.square())
    return torch.linalg.solve_triangular(factor.UT_CC.t(), M_RC, upper=True, left=False, unitriangular=True)


def _some_rows(W_RC: Tensor, count: int) -> Tensor:
    """Rows spread over a weight."""
    return W_RC[:: max(1, len(W_RC) // max(1, count))]
