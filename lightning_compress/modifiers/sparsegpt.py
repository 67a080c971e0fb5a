"""SparseGPT: prune column after column, each time moving the error onto the columns still to come.

Frantar & Alistarh, 2023, arXiv:2301.00774; here with the factor of H that GPTQ uses (layerwise/factor.py), no inverse:

    v_F     = w_F + (W_<t - Q_<t) H_<t,F (H_FF)^-1      weights from column t on, corrected for all earlier columns
            = w_F + (a_F - w_F) (U_FF)^-1               a_F: the same without the errors of F itself
    score_j = v_j^2 / [(H_FF)^-1]_jj = v_j^2 p_j^2      by how much pruning column j raises the loss (F = j, j+1 ...)
    q_j     = v_j where the weight stays, else 0

The mask of a block of 128 columns is chosen when the sweep reaches it, over all rows of the block (``scope="block"``,
as in the paper) or row by row; that of N:M every M columns. The result of the sweep is refitted on its support
(layerwise/least_squares_refit.py): earlier columns then correct later ones, too.

Shapes: R rows, C columns (inputs), b columns of a block, P partitions of a grouped convolution.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lightning_compress.layerwise.dense_target import Target, dense_step, moved
from lightning_compress.layerwise.factor import Factor, factorize_retrying, undamped_energy
from lightning_compress.layerwise.layer import Hessian, Layer, Solved
from lightning_compress.layerwise.least_squares_refit import refit
from lightning_compress.layerwise.pruner import LayerwisePruner
from lightning_compress.layerwise.token_weights import Objective
from lightning_compress.ops.gptq_block import SUB_BLOCK, Block, gptq_block_
from lightning_compress.pruning.masks import keep_highest, keep_rows

__all__ = ["SparseGPTModifier", "prune_columns"]


def prune_columns(
    W_RC: Tensor,
    factor: Factor,
    sparsity: float,
    pattern: tuple[int, int] | None = None,
    block: int = 128,
    scope: Literal["block", "row"] = "block",
) -> tuple[Tensor, Tensor]:
    """The sweep of the paper.

    Args:
        W_RC: Weights, in the dtype of the factor; entries that are zero stay zero, and count.
        factor: Factor of the damped H, columns from left to right.
        sparsity: Share to remove, in [0, 1): ``floor(sparsity * R * C)`` weights in all, spread evenly over blocks
            (with ``scope="row"`` over rows too: ``floor(sparsity * C)`` each).
        pattern: (N, M): of every M consecutive columns N stay, regardless of ``sparsity``. M divides ``block`` and C.
        block: Number of columns whose mask is chosen at once, and after which errors are added to all later columns.
        scope: Weights that are ranked together: all rows of a block, or each row.

    Returns:
        Q [R, C], and the mask of the weights that stay, bool [R, C].
    """
    R, C = W_RC.shape
    W_CR, U_CC, importance_C = W_RC.t().contiguous(), factor.UT_CC.t(), factor.pivot_C.square()
    if W_CR.is_cuda:
        U_CC = U_CC.contiguous()  # kernels read its rows
    A_CR, Q_CR, keep_CR = W_CR.clone(), torch.empty_like(W_CR), W_CR != 0
    D_bR = W_CR.new_empty(min(block, C), R)
    M = 1 if pattern is None else pattern[1]
    sub_block = M * max(1, SUB_BLOCK // M)

    def choose(low: int, high: int) -> None:
        """Choose the mask of some columns, given the errors of all earlier columns."""
        W, keep = W_CR[low:high], keep_CR[low:high]
        UT_bb = U_CC[low:high, low:high].t()
        shift = torch.linalg.solve_triangular(UT_bb, A_CR[low:high] - W, upper=False, unitriangular=True)
        score = shift.add_(W).square_().mul_(importance_C[low:high, None]).masked_fill_(~keep, -1.0)
        if pattern is not None:
            keep &= keep_rows(score.t(), 0.0, f"{pattern[0]}:{pattern[1]}").t()
        elif scope == "row":
            lowest = score.argsort(dim=0, stable=True)[: _count(sparsity, high) - _count(sparsity, low)]
            keep.scatter_(0, lowest, False)
        else:
            keep &= keep_highest(score, _count(sparsity, R * high) - _count(sparsity, R * low))

    def update(low: int, high: int, first: int, last: int, sub_block: int) -> None:
        """Prune columns first to last by their mask, and add their errors to all columns from low to high."""
        b, columns = slice(low, high), (first - low, last - low)
        D = D_bR[low % block : low % block + high - low]
        matrices = Block(A_CR[b], Q_CR[b], D, W_CR[b], U_CC[b, b], keep_CR[b])
        gptq_block_(matrices, columns=columns, sub_block=sub_block)

    for i1 in range(0, C, block):
        i2 = min(i1 + block, C)
        if pattern is None:
            choose(i1, i2)
            update(i1, i2, i1, i2, SUB_BLOCK)
        for j1 in range(i1, i2, sub_block) if pattern is not None else ():
            j2 = min(j1 + sub_block, i2)
            for j in range(j1, j2, M):
                choose(j, j + M)
                update(j1, j2, j, j + M, sub_block)
            if j2 < i2:
                A_CR[j2:i2].addmm_(U_CC[j1:j2, j2:i2].t(), D_bR[j1 - i1 : j2 - i1])
        if i2 < C:
            A_CR[i2:].addmm_(U_CC[i1:i2, i2:].t(), D_bR[: i2 - i1])
    return Q_CR.t(), keep_CR.t()


def _count(sparsity: float, units: int) -> int:
    return int(sparsity * units + 1e-9)


class _Prepared(NamedTuple):
    H_CC: Tensor  # damped
    factor: Factor
    S_CC: Tensor | None  # step towards the dense target; None: none
    note: str | None


class SparseGPTModifier(LayerwisePruner):
    """Prune with SparseGPT on calibration data, and refit the remaining weights.

    The other arguments are those of :class:`~lightning_compress.pruning.arguments.PruningArguments`: ``targets``,
    ``ignore``, ``sparsity``, ``mask_structure``, ``sparsity_profile``, ``owl_m``, ``owl_lmbda``,
    ``refit_iterations`` (0: none, as in the paper), ``dampening_frac``, ``share_inputs``.

    Args:
        block_size: Number of columns whose mask is chosen at once, a multiple of M.
        scope: Unstructured masks rank all rows of a block together (``block``, as in the paper) or each ``row``.
        on_failure: When H is not positive definite: ``raise``; ``retry`` with ten times the damping, up to 1.0, then
            raise. The ledger notes it.
        objective: ``layer``, ``loss``, ``output`` or ``training_step``: whether tokens are weighed by the gradient of a
            loss, as in :class:`~lightning_compress.modifiers.gptq.modifier.GPTQModifier`.
        target: ``layer`` or ``dense``: the outputs that weights are fitted to, as there.

    Raises:
        ValueError: A sparsity outside of [0, 1) or other than that of the pattern, a width that M does not divide.
    """

    technique: ClassVar[str] = "sparsegpt"

    block_size: int = Field(default=128, ge=1)
    scope: Literal["block", "row"] = "block"
    on_failure: Literal["raise", "retry"] = "raise"
    objective: Objective = "layer"
    target: Target = "layer"

    @property
    def holds_out(self) -> bool:
        return self.target == "dense"

    @model_validator(mode="after")
    def _block_holds_patterns(self) -> "SparseGPTModifier":
        if self.pattern is not None and self.block_size % self.pattern[1]:
            raise ValueError(
                f"block_size={self.block_size} is not a multiple of {self.pattern[1]}, the width of the pattern "
                f"{self.mask_structure}; give such as {self.pattern[1] * max(1, 128 // self.pattern[1])}"
            )
        return self

    def rows_apart(self, name: str) -> bool:
        return self.pattern is not None or self.scope == "row"

    def prepare(self, hessian: Hessian, layers: Sequence[Layer]) -> _Prepared:
        """The damped H, its factor, and the step towards the target."""
        S_CC, note = dense_step(hessian, layers) if self.target == "dense" else (None, None)
        H_CC, retry = hessian.H_CC, self.on_failure == "retry"
        factor, dampening = factorize_retrying(H_CC, self.dampening_frac, by_size=False, retry=retry)
        if factor is None:
            raise ValueError(
                f"H of {', '.join(map(repr, hessian.layers))} is not positive definite with dampening_frac="
                f"{dampening:g} ({hessian.tokens} tokens for {len(H_CC)} columns); raise dampening_frac "
                f"(0.01 to 0.1 is usual), calibrate on more tokens, or set on_failure='retry'"
            )
        H_CC.diagonal().add_(factor.added_C)
        return _Prepared(H_CC, factor, S_CC, note)

    def solve(self, layer: Layer, prepared: _Prepared) -> Solved:
        H_CC, factor, S_CC, note = prepared
        W_RC = layer.W_RC.float()
        if S_CC is not None:
            W_RC = moved(W_RC, S_CC) * (W_RC != 0)
        Q_RC, keep_RC = prune_columns(W_RC, factor, self.sparsity_in(layer), self.pattern, self.block_size, self.scope)
        Q_RC = refit(W_RC, Q_RC, keep_RC, H_CC, self.refit_iterations).to(layer.W_RC.dtype)
        raised = f"damping raised to {factor.dampening:g}" if factor.dampening != self.dampening_frac else None
        return Solved(
            Q_RC,
            undamped_energy(W_RC - Q_RC.float(), factor),
            undamped_energy(W_RC, factor),
            flag="; ".join(text for text in (note, raised) if text) or None,
        )
