"""GPTQ: round column after column, each time moving the error onto the columns still to come.

Frantar et al., 2022, arXiv:2210.17323; in the LDL form of Chee et al., 2023 (QuIP, arXiv:2307.13304), which gives the
same codes with one Cholesky factorization and no inverse:

    H   = E[x x^T] + lambda I                          lambda = dampening_frac * mean(diag E[x x^T])
    H   = U diag(p)^2 U^T                              U upper triangular with ones on its diagonal
    a_j = w_j + sum_{k<j} (w_k - q_k) U_kj             column j, adjusted for all errors made so far
    q_j = nearest point of the grid to a_j
    (W - Q) H (W - Q)^T = sum_j p_j^2 (a_j - q_j)^2    the loss, per row, for free

With ``actorder`` columns go in order of falling H_jj. Scales are fixed before, per group of neighbouring columns, so
that the order leaves no trace in the result. A column whose input is always zero has H_jj = lambda and no ties to the
others: it is rounded to nearest.

Shapes: R rows, C columns (inputs), G groups of g columns.
"""

from collections.abc import Hashable, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from compressed_tensors.quantization import QuantizationScheme
from pydantic import Field, field_validator
from torch import Tensor, nn

from lightning_compress.core import Needs, State
from lightning_compress.layers.matrix import as_matrix, partitions
from lightning_compress.layerwise.dense_target import Target, dense_step, moved
from lightning_compress.layerwise.factor import Factor, factorize_retrying
from lightning_compress.layerwise.layer import Hessian, Layer, Solved
from lightning_compress.layerwise.quantizer import LayerwiseQuantizer
from lightning_compress.layerwise.token_weights import GRADIENTS, UNSHARDED, Objective
from lightning_compress.modifiers.gptq.held_out import DAMPENINGS, Choice, choose, damped
from lightning_compress.modifiers.gptq.refinement import is_refinable, refined
from lightning_compress.modifiers.gptq.solver import (
    Matrix,
    Scales,
    ScaleSearch,
    Solver,
    adjusted,
    output_error,
    rows_of,
)
from lightning_compress.pruning.arguments import zeros_stay
from lightning_compress.quant.embeddings import Embeddings
from lightning_compress.quant.observers import ObserverName
from lightning_compress.quant.rounding import DEAD_INPUT
from lightning_compress.quant.schemes import no_group_order

__all__ = ["GPTQModifier"]


class _Prepared(NamedTuple):
    factor: Factor
    H_CC: Tensor | None  # damped; None: no refinement
    S_CC: Tensor | None  # step towards the dense target; None: none
    note: str | None  # for the ledger


class GPTQModifier(LayerwiseQuantizer):
    """Quantize weights with GPTQ on calibration data.

    ``targets``, ``ignore``, ``scheme``, ``group_size`` and ``config_groups`` are those of
    :class:`~lightning_compress.quant.arguments.QuantizationArguments`, ``observer``,
    ``averaging_constant`` and ``preserve_zeros`` those of
    :class:`~lightning_compress.layerwise.quantizer.LayerwiseQuantizer`.

    Args:
        block_size: Columns after which errors reach all columns still to come; changes speed, not results.
        dampening_frac: Share of the mean diagonal of H that is added to its diagonal. ``auto``: 0.01, 0.03, 0.1 or 0.3,
            the one with the least error on every second batch when fitted to the others; then all batches count.
        refine: Refit scales and improve codes afterwards (refinement.py), in layers where that lowers the error on
            batches held out in the same way.
        actorder: ``static`` (= ``weight``): columns with large inputs first; None: from left to right.
        scale_search: ``hessian``: per row and group the scale with the least sum_j H_jj (w_j - q_j)^2; up to 3 bits
            that, the min-max scale, or the mean of both: the one with the least loss when the row is rounded. ``mse``:
            the least sum |w_j - q_j|^2.4. ``minmax``: from the extremes, as llm-compressor does.
        on_failure: When H is not positive definite: ``raise``; ``retry`` with ten times the damping, up to 1.0, then
            raise; ``round`` to nearest. The ledger notes it.
        objective: ``layer``: the squared error of the layer's output. ``loss``: the same with each token weighed by the
            square of the loss's gradient there (layerwise/token_weights.py), from a forward and a backward pass of the
            dense model before the walk; labels are drawn from its logits. ``output``: the same for models without
            classes, with the squared error of the output as loss. ``training_step``: the loss that the LightningModule
            trains on, with the labels of the batches; without a Trainer ``loss`` of ``compress``. A batch for which it
            has none keeps equal weights.
        target: ``layer``: the layer's own output for inputs that come from compressed layers. ``dense``: its output in
            the dense model (layerwise/dense_target.py), from one more forward pass of each block, as far as that lowers
            the error on every second batch when fitted to the others. Layers outside of blocks, and single experts of a
            mixture, keep ``layer``.
        share_inputs: One H for modules that receive the same tensor (query, key, value; gate, up).
        keep_latents: Keep the values that were rounded to each weight, for a QATModifier that continues from them. They
            take the memory of the weights once more, and are never saved.
        start: Quantize before the batch at ``start``, in ``unit``, instead of after training: for a QATModifier later
            in the recipe with the same scheme, start and unit, which continues from the result.
    """

    technique: ClassVar[str] = "gptq"
    promotable: ClassVar[bool] = True
    every_format: ClassVar[bool] = True
    embeddings: ClassVar[Embeddings] = "shared"

    block_size: int = Field(default=128, ge=1)
    dampening_frac: Annotated[float, Field(ge=0)] | Literal["auto"] = 0.01
    refine: bool = False
    actorder: Literal["static", "weight"] | None = "static"
    scale_search: ScaleSearch = "hessian"
    on_failure: Literal["raise", "retry", "round"] = "raise"
    objective: Objective = "layer"
    target: Target = "layer"
    share_inputs: bool = True
    observer: ObserverName = "minmax"
    averaging_constant: float = Field(default=0.01, gt=0, le=1)
    preserve_zeros: bool | None = None
    keep_latents: bool = False

    @field_validator("actorder", mode="before")
    @classmethod
    def _order_is_static(cls, actorder: Any) -> Any:
        if isinstance(actorder, str) and actorder.lower() in ("group", "dynamic"):
            raise ValueError(no_group_order(actorder))
        return actorder

    @property
    def holds_out(self) -> bool:
        return self.refine or self.dampening_frac == "auto" or self.target == "dense"

    @property
    def needs(self) -> Needs:
        gradients = GRADIENTS[self.objective]
        sharded = True if gradients is None else UNSHARDED
        return Needs(
            data=True, one_pass=True, hand_over=self.start is not None, team="sums", sharded=sharded,
            survey=gradients is not None, gradients=gradients, dense_inputs=self.target == "dense",
        )  # fmt: skip

    @property
    def keeps_latents(self) -> bool:
        return self.keep_latents or self.needs.hand_over

    def find_layers(self, model: nn.Module) -> dict[str, nn.Module]:
        modules = super().find_layers(model)
        ordered = {id(scheme): self._ordered(scheme) for scheme in [*self.schemes, *self._schemes.values()]}
        self._schemes = {name: ordered[id(scheme)] for name, scheme in self._schemes.items()}
        return modules

    def _ordered(self, scheme: QuantizationScheme) -> QuantizationScheme:
        """The scheme with the column order, as readers of the export expect."""
        weights = scheme.weights
        assert weights is not None
        order = weights.actorder
        if order is not None and self.actorder not in ("static", "weight"):
            raise ValueError(f"actorder={self.actorder} of the modifier contradicts actorder={order!r} of the scheme")
        return scheme.model_copy(update={"weights": weights.model_copy(update={"actorder": order or self.actorder})})

    # -- one Hessian --------------------------------------------------------------------------------------------------

    def group_of(self, name: str) -> Hashable:
        """One column loop for the layers of one H and scheme, but for partitions of convolutions."""
        return id(self._schemes[name].weights) if partitions(self._layers[name]) == 1 else name

    def rows_apart(self, name: str) -> bool:
        return self.weights_of(name).strategy not in ("tensor", "block")

    def _solver(self, name: str) -> Solver:
        return Solver(self.weights_of(name), self.scale_search, self.block_size)

    def prepare(self, hessian: Hessian, layers: Sequence[Layer]) -> _Prepared | None:
        """The factor of the damped H; None where layers are to be rounded to nearest (``on_failure="round"``).

        Choices on held-out batches are made with the weights of these layers, and hold for all layers that share H.

        Raises:
            ValueError: H is not positive definite, and ``on_failure`` does not help.
        """
        solver, H_CC, auto = self._solver(layers[0].name), hessian.H_CC, self.dampening_frac == "auto"
        by_size = solver.args.actorder is not None
        choice = Choice(DAMPENINGS[0] if self.dampening_frac == "auto" else self.dampening_frac, False)
        S_CC, target = dense_step(hessian, layers) if self.target == "dense" else (None, None)
        if hessian.halves is not None and (self.refine or auto):
            dampenings = DAMPENINGS if auto else (choice.dampening,)
            matrices, refine = (
                [self._matrix(layer, S_CC) for layer in layers],
                self.refine and is_refinable(solver.args),
            )
            best = choose(solver, matrices, hessian.halves, dampenings, by_size, refine)
            choice = best or Choice(dampenings[-1], False)
        is_dead = not H_CC.diagonal().any()  # H is positive semidefinite
        factor, dampening = factorize_retrying(H_CC, choice.dampening, by_size, retry=self.on_failure == "retry")
        if factor is None:
            if self.on_failure == "round":
                return None
            names = ", ".join(repr(layer.name) for layer in layers)
            raise ValueError(
                f"H of {names} is not positive definite with dampening_frac={dampening:g} ({hessian.tokens} tokens "
                f"for {len(H_CC)} columns); raise dampening_frac (0.01 to 0.1 is usual), calibrate on more tokens, "
                f"or set on_failure='retry' or 'round'"
            )
        one_batch, raised = (self.refine or auto) and hessian.halves is None, dampening != choice.dampening
        notes = [
            "one calibration batch: nothing held out to choose the damping or refinement by" if one_batch else None,
            DEAD_INPUT if is_dead else None,
            f"damping {'raised to ' if raised else ''}{dampening:g}" if raised or auto else None,
            target,
            {(True, True): "refined", (True, False): "not refined"}.get((self.refine, choice.refine)),
        ]
        note = "; ".join(note for note in notes if note) or None
        return _Prepared(factor, damped(H_CC, factor) if choice.refine else None, S_CC, note)

    def solve_together(self, layers: Sequence[Layer], prepared: _Prepared) -> list[Solved]:
        solver, factor = self._solver(layers[0].name), prepared.factor
        matrices = [self._matrix(layer, prepared.S_CC) for layer in layers]
        solved = solver(matrices, factor)
        if prepared.H_CC is not None and is_refinable(solver.args):
            solved = refined(solver, solved, matrices, prepared.H_CC)
        results = []
        for matrix, one in zip(matrices, solved, strict=True):
            latent_RC = adjusted(one.W_RC, one.Q_RC, factor) if self.keeps_latents else None
            if latent_RC is not None and matrix.keep_RC is not None:
                latent_RC *= matrix.keep_RC
            parts = {"scale": one.scale, "zero_point": one.zero_point, "latent": latent_RC}
            results.append(Solved(one.Q_RC, *output_error(one, factor), prepared.note, parts))
        return results

    def common(self, layer: Layer, prepared: Sequence[_Prepared]) -> Scales | None:
        factors = [one.factor for one in prepared]
        return self._solver(layer.name).common_scales(layer.W_RC, factors, self._globals.of(layer.name))

    def _matrix(self, layer: Layer, S_CC: Tensor | None) -> Matrix:
        W_RC, scales = moved(layer.W_RC, S_CC), None
        if layer.common is not None:
            scales = rows_of(layer.common, layer.rows, len(as_matrix(layer.module)), self.weights_of(layer.name))
        stays = zeros_stay(as_matrix(layer.module), self.preserve_zeros)  # for all of its partitions or pieces
        keep_RC = layer.W_RC != 0 if stays else None
        return Matrix(W_RC, keep_RC, self._globals.of(layer.name), scales)

    def give_up(self, state: State, name: str, tokens: int) -> None:
        self.round(state, name, "H not positive definite; rounded to nearest", tokens)
